"""Fused weights by hand, neutral factors at first, and merging."""

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structured.depth.alike import linear_roles
from lightning_prune.structured.depth.fusing import (
    FusedBlock,
    HiddenDivergence,
    HiddenSquaredError,
    fused_weight,
)
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import tiny_model


def test_fused_weight_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    removed = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    low_rank = (torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0, 6.0]]))
    coefficients = (torch.tensor([[0.0], [0.5]]), torch.tensor([[1.0, 2.0]]))
    fused = fused_weight(weight, removed, low_rank, coefficients)
    assert fused.tolist() == [[1 + 5, 2 + 6], [3 + 0.5 * 30, 4 + 1.0 * 40]]


def test_losses_by_hand() -> None:
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    fused = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert HiddenSquaredError().loss(fused, dense).item() == pytest.approx((1 + 4) / 4)
    expected = 0.0
    for dense_row, fused_row in zip(dense.tolist(), fused.tolist(), strict=True):
        p, q = torch.tensor(dense_row).softmax(0), torch.tensor(fused_row).softmax(0)
        expected += float((p * (p / q).log()).sum()) / 2
    assert HiddenDivergence().loss(fused, dense).item() == pytest.approx(expected, rel=1e-5)
    assert HiddenDivergence().loss(dense + 3, dense).item() == pytest.approx(0, abs=1e-6)


def run(block: object, stream: Tensor) -> Tensor:
    assert callable(block)
    output = block(stream)
    assert isinstance(output, Tensor | tuple)
    return output[0] if isinstance(output, tuple) else output


def two_blocks() -> list[nn.Module]:
    return find_blocks(tiny_model("gpt2"))  # Conv1D: weights lie the other way round


def test_a_new_fused_block_is_the_block_and_a_merged_one_is_the_fused() -> None:
    block, removed = two_blocks()
    stream = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    fused = FusedBlock(block, removed, 3, seed="x")
    with torch.no_grad():
        before = run(block, stream)
        assert torch.equal(run(fused, stream), before)
        generator = torch.Generator().manual_seed(1)
        for parameter in (*fused.slow, *fused.fast):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        expected = run(fused, stream)
        assert torch.equal(run(block, stream), before)
        fused.merge_()
        assert not torch.allclose(run(block, stream), before, atol=1e-2)
        assert torch.allclose(run(block, stream), expected, atol=1e-5)


def test_transposed_layers_are_fused_in_their_own_orientation() -> None:
    block, removed = two_blocks()
    fused = FusedBlock(block, removed, 1, seed="x")
    factors = fused.factors["mlp.c_fc"]
    assert (factors.b_OR.shape, factors.a_RI.shape) == ((128, 1), (1, 32))
    before, other = block.mlp.c_fc.weight.detach().clone(), removed.mlp.c_fc.weight.detach()
    with torch.no_grad():
        factors.c_OR[5] = 2.0
        factors.d_RI.fill_(0.25)
        fused.merge_()
    expected = before.clone()
    expected[:, 5] += 0.5 * other[:, 5]
    assert torch.allclose(block.mlp.c_fc.weight, expected)


def test_factors_follow_the_seed_and_their_name() -> None:
    block, removed = two_blocks()
    one, same, other = (FusedBlock(block, removed, 2, seed=seed).factors["attn.c_proj"] for seed in "xxy")
    assert torch.equal(one.a_RI, same.a_RI)
    assert not torch.equal(one.a_RI, other.a_RI)
    assert one.a_RI.abs().max() <= 32**-0.5
    assert set(linear_roles(block)) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    names = set(FusedBlock(block, removed, 2, seed="x").norms)
    assert names == {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"}
