"""Every layout gives one row per output, columns in the order of the inputs, and undoes it."""

import pytest
import torch
from torch import nn

from lightning_prune.targets.layouts import Form, Kernel, Layout, Stored, Transposed, TransposedKernel


def same(layout: Layout, stored: torch.Tensor, expected_OI: torch.Tensor) -> None:
    matrix = layout.to_matrix(stored, stored.shape)
    assert tuple(matrix.shape) == layout.shape_OI(stored.shape)
    assert torch.equal(matrix, expected_OI)
    assert torch.equal(layout.from_matrix(matrix, stored.shape), stored)


def test_outputs_before_inputs_are_read_as_they_lie() -> None:
    same(Stored(), torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3))
    same(Stored(), torch.arange(12.0).reshape(2, 2, 3), torch.arange(12.0).reshape(4, 3))


def test_inputs_before_outputs_are_turned() -> None:
    same(Transposed(), torch.tensor([[0.0, 1, 2], [3, 4, 5]]), torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    stacked = torch.tensor([[[0.0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]])
    same(Transposed(is_stack=True), stacked, torch.tensor([[0.0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]))
    assert not Transposed().is_by_rows
    assert Transposed(is_stack=True).is_by_rows


def test_neighbours_in_a_row_of_a_kernel_are_neighbouring_channels() -> None:
    kernel = torch.arange(8.0).reshape(1, 2, 4)  # two channels, four positions
    same(Kernel(), kernel, torch.tensor([[0.0, 4, 1, 5, 2, 6, 3, 7]]))
    assert Kernel().num_taps(kernel.shape) == 4
    assert Kernel(groups=2).num_groups == 2


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_kernel_weighs_each_output_by_its_row(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(4, 6, 1, groups=groups, bias=False)
    weight = layer.weight.detach()
    rows_OI = TransposedKernel(groups).to_matrix(weight, weight.shape)
    inputs = torch.randn(1, 4, 5)
    per_group = inputs.reshape(groups, 4 // groups, 5)
    expected = torch.cat([rows @ part for rows, part in zip(rows_OI.chunk(groups), per_group, strict=True)])
    torch.testing.assert_close(layer(inputs)[0], expected)
    same(TransposedKernel(groups), weight, rows_OI)


def test_channels_of_a_transposed_kernel_are_neighbours_at_one_position() -> None:
    kernel = torch.arange(8.0).reshape(2, 1, 4)  # two inputs, one output, four positions
    same(TransposedKernel(), kernel, torch.tensor([[0.0, 4, 1, 5, 2, 6, 3, 7]]))
    assert not TransposedKernel().is_by_rows


def test_a_bilinear_form_has_one_row_of_products_per_output() -> None:
    form = torch.arange(12.0).reshape(2, 2, 3)
    same(Form(), form, torch.arange(12.0).reshape(2, 6))
    assert Form().num_taps(form.shape) == 2
