"""Norms of input features: by hand, in any order, over ranks, in low precision."""

import numpy as np
import pytest
import torch

from lightning_prune.statistics.input_norm import InputNorm


def test_by_hand() -> None:
    norm = InputNorm(torch.ones(2, 3), 3)
    norm.update(torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    norm.update(torch.tensor([[4.0, 0.0, 1.0]]))
    torch.testing.assert_close(norm.compute(), torch.tensor([5.0, 0.0, 3.0**0.5]))
    assert norm.compute().dtype == torch.float32
    assert int(norm.num_tokens) == 3


def test_parts_add_up_to_the_whole() -> None:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    whole, parts = InputNorm(torch.ones(1, 6), 6), InputNorm(torch.ones(1, 6), 6)
    whole.update(inputs)
    for part in inputs.split(7):
        parts.update(part)
    torch.testing.assert_close(whole.compute(), parts.compute())
    np.testing.assert_allclose(whole.compute().numpy(), np.linalg.norm(inputs.double().numpy(), axis=0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_inputs_in_low_precision_do_not_overflow(dtype: torch.dtype) -> None:
    norm = InputNorm(torch.ones(1, 2), 2)
    norm.update(torch.full((1000, 2), 4096.0, dtype=dtype))  # the square alone is above the largest float16
    torch.testing.assert_close(norm.compute(), torch.full((2,), 4096.0 * 1000**0.5))


def test_small_changes_of_a_large_sum_are_kept() -> None:
    norm = InputNorm(torch.ones(1, 1), 1)
    norm.update(torch.tensor([[1e4]]))
    for _ in range(100):
        norm.update(torch.tensor([[1.0]]))  # each is lost in a float32 sum of 1e8
    assert float(norm.sum_of_squares) == pytest.approx(1e8 + 100, abs=1e-6)


def test_ranks_are_merged_by_adding() -> None:
    norm = InputNorm(torch.ones(1, 2), 2)
    assert norm.source == "input"
    assert set(norm._reductions) == {"sum_of_squares", "num_tokens"}
    parts = torch.stack([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    assert torch.equal(norm._reductions["sum_of_squares"](parts), torch.tensor([4.0, 6.0]))


def test_a_restart_forgets() -> None:
    norm = InputNorm(torch.ones(1, 2), 2)
    norm.update(torch.ones(3, 2))
    norm.reset()
    assert not norm.update_called
    assert norm.sum_of_squares.tolist() == [0.0, 0.0]
