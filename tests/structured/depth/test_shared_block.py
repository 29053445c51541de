"""A block that shares computes with the donor's own tensors, and stores them once."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_prune.structured.depth.alike import linear_roles
from lightning_prune.structured.depth.shared_block import SharedLinear, UpdateNorm, share_block
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import padded_batches, tiny_model

BATCH = padded_batches(1)[0]


def randomly_filled(layer: SharedLinear) -> SharedLinear:
    with torch.no_grad():
        layer.factor_b.normal_()
    return layer


@pytest.mark.parametrize("is_transposed", [False, True])
def test_product_with_the_sum_of_the_matrices(is_transposed: bool) -> None:
    torch.manual_seed(0)
    donor: nn.Module = Conv1D(5, 3) if is_transposed else nn.Linear(3, 5)
    bias = nn.Parameter(torch.randn(5))
    layer = randomly_filled(SharedLinear(donor, 2, bias=bias))
    inputs = torch.randn(2, 4, 3)
    weight = donor.weight.T if is_transposed else donor.weight
    expected = inputs @ (weight + layer.factor_b @ layer.factor_a).T + bias
    assert torch.allclose(layer(inputs), expected, atol=1e-6)
    assert torch.allclose(
        layer.weight,
        (weight + layer.factor_b @ layer.factor_a).mT if is_transposed else weight + layer.factor_b @ layer.factor_a,
    )
    assert set(dict(layer.named_parameters())) == {"factor_a", "factor_b", "bias"}
    assert SharedLinear(donor, 99, bias=None).factor_b.shape == (5, 3)


def test_a_new_layer_is_the_donor_and_can_learn() -> None:
    donor = nn.Linear(3, 5, bias=False)
    layer = SharedLinear(donor, 2, bias=None)
    inputs = torch.randn(4, 3)
    assert torch.equal(layer(inputs), donor(inputs))
    layer(inputs).square().sum().backward()
    assert layer.factor_b.grad is not None
    assert layer.factor_b.grad.abs().sum() > 0
    assert donor.weight.grad is not None


def test_update_is_scaled_and_shifted() -> None:
    norm = UpdateNorm(torch.zeros(2))
    before, after = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 5.0]])
    assert torch.equal(norm(before, after), after)
    with torch.no_grad():
        norm.scale.copy_(torch.tensor([2.0, 0.5]))
        norm.shift.copy_(torch.tensor([10.0, 0.0]))
    assert norm(before, after).tolist() == [[1 + 2 * 1 + 10, 2 + 0.5 * 3]]


def shared_gpt2() -> GPT2LMHeadModel:
    model = tiny_model("gpt2")
    donor, block = find_blocks(model)
    share_block(block, donor, 2, width=32, names=list(linear_roles(block)))
    for module in block.modules():
        if isinstance(module, SharedLinear):
            randomly_filled(module)
    return model


def test_donor_is_trained_saved_and_copied_once() -> None:
    model = shared_gpt2()
    block = model.transformer.h[1]
    assert not [name for name in block.state_dict() if name.endswith("c_fc.weight")]
    assert (
        sum(p.numel() for p in block.parameters())
        == 2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32) + sum((96, 32, 128, 32)) + 6 * 32
    )
    logits = model(**BATCH).logits
    copied = copy.deepcopy(model)
    assert copied.transformer.h[1].mlp.c_fc.donor[0] is copied.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()
    assert not torch.allclose(model(**BATCH).logits, logits, atol=1e-2)
    assert torch.equal(copied(**BATCH).logits, logits)
    other = shared_gpt2()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(copied.state_dict())
    assert torch.equal(other(**BATCH).logits, logits)


def test_gradients_of_the_donor_come_from_both_blocks() -> None:
    model = shared_gpt2()
    donor = model.transformer.h[0].mlp.c_fc
    shared = model.transformer.h[1].mlp.c_fc
    model(**BATCH).logits.square().mean().backward()
    both = donor.weight.grad.clone()
    model.zero_grad()
    weight = shared.weight.detach().clone().requires_grad_()
    shared.forward = lambda inputs: inputs @ weight + shared.bias
    model(**BATCH).logits.square().mean().backward()
    assert torch.allclose(both, donor.weight.grad + weight.grad, atol=1e-6)
