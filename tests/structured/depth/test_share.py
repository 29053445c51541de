"""Which donor is chosen, what a block becomes, and what brings its update back to what it was."""

import copy
import dataclasses
import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.depth.alike import linear_roles, weight_of
from lightning_prune.structured.depth.criteria import NextTokenLoss
from lightning_prune.structured.depth.influence import block_influence, block_streams
from lightning_prune.structured.depth.share import (
    FlexiGPT,
    check_shares,
    donor_residual,
    low_rank_difference,
    materialised,
    normalise_updates,
    share_blocks,
)
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Plan, Share
from lightning_prune.structured.shrink import shrink
from lightning_prune.targets.targets import find_blocks
from tests.structured.depth_models import NOTHING, padded_batches, sampled, shake, stories3m, tiny_model
from tests.tiny_models import STACKS_EXPERTS, tiny_llama

BATCHES = padded_batches(6)


def four_blocks() -> PreTrainedModel:
    model = tiny_llama(layers=4)
    shake(model)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCHES[0]).logits


def test_difference_is_the_truncated_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, donor = (torch.randn(7, 5, generator=generator) for _ in range(2))
    u, s, v = torch.linalg.svd(weight.double() - donor.double(), full_matrices=False)
    b, a = low_rank_difference(weight, donor, 2)
    assert torch.allclose(b @ a, u[:, :2] @ torch.diag(s[:2]) @ v[:2])
    assert torch.allclose(b.square().sum(0), a.square().sum(1))  # the same size
    left = (weight.double() - donor.double() - b @ a).square().sum() / weight.double().square().sum()
    assert donor_residual(weight, donor, 2) == pytest.approx(float(left), rel=1e-9)
    assert donor_residual(weight.T, donor.T, 2) == pytest.approx(float(left), rel=1e-9)
    assert donor_residual(weight, weight, 1) == 0
    assert donor_residual(weight, donor, 5) == 0
    b, a = low_rank_difference(weight, donor, 99)
    assert (b.shape, a.shape) == ((7, 5), (5, 5))
    assert torch.allclose(donor.double() + b @ a, weight.double())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom"])
def test_full_rank_is_the_original_block(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    share_blocks(model, [Share(1, 0, 32)], width=32)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_low_rank_is_the_model_with_the_sums() -> None:
    model = four_blocks()
    shares = [Share(1, 0, 3), Share(2, 0, 5)]
    before = logits(model)
    with materialised(model, shares):
        expected = logits(model)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(expected, before, atol=1e-2)
    share_blocks(model, shares, width=32)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_the_block_of_least_influence_takes_its_copy_as_donor() -> None:
    model = four_blocks()
    with torch.no_grad():
        for layer in (1, 3):
            for name, module in linear_roles(model.model.layers[layer]).items():
                weight_of(module).copy_(weight_of(linear_roles(model.model.layers[1])[name]))
        model.model.layers[1].input_layernorm.weight.mul_(1e-3)  # the same matrices, but it does little
        model.model.layers[1].post_attention_layernorm.weight.mul_(1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = FlexiGPT(num_blocks=1, rank=2).plan(model, NOTHING, BATCHES, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    influence = block_influence(model, BATCHES)
    assert min(influence) == influence[1]
    assert plan.share == (Share(1, 3, 2),)
    assert plan.method["donors"] == [3]
    assert plan.method["residuals"][0][2] == 0
    assert plan.method["residuals"][0][0] > 0.1
    dense = logits(model)
    share_blocks(model, plan.share, width=32)
    assert torch.allclose(logits(model), dense, atol=1e-5)


def test_plans_go_through_json_and_older_readers_stop() -> None:
    plan = FlexiGPT(num_blocks=2, rank=3).plan(four_blocks(), NOTHING, BATCHES, progress=False)
    values = json.loads(json.dumps(plan.as_dict()))
    assert Plan.from_dict(values) == plan
    assert len(plan.share) == 2
    assert values["format"] == 2
    assert Plan(layers=(0,)).as_dict()["format"] == 1
    assert "share" not in Plan(layers=(0,)).as_dict()


def updates(model: nn.Module, layer: int) -> list[torch.Tensor]:
    streams = [block_streams(model, batch) for batch in BATCHES]
    return [outputs[layer][mask] - inputs[layer][mask] for inputs, outputs, mask in streams]


def test_updates_get_back_their_mean_and_spread() -> None:
    dense, model = four_blocks(), four_blocks()
    shares = [Share(2, 0, 2), Share(1, 3, 2)]
    share_blocks(model, shares, width=32)
    normalise_updates(model, dense, shares, BATCHES)
    for layer in (1, 2):
        every = [torch.cat(updates(one, layer)) for one in (dense, model)]
        moments = [(value.mean(0), value.std(0, correction=0)) for value in every]
        assert torch.allclose(moments[0][0], moments[1][0], atol=1e-5)
        assert torch.allclose(moments[0][1], moments[1][1], rtol=1e-4)
    assert (model.model.layers[1].update_norm.scale - 1).abs().max() > 0.05
    with pytest.raises(ValueError, match="no calibration batches"):
        normalise_updates(model, dense, shares, [])


def test_least_squares_is_the_best_line_through_the_updates() -> None:
    dense, model = four_blocks(), four_blocks()
    shares = [Share(2, 0, 2, "least_squares")]
    share_blocks(model, shares, width=32)
    new, old = (torch.cat(updates(one, 2)).double() for one in (model, dense))
    normalise_updates(model, dense, shares, BATCHES)
    norm = model.model.layers[2].update_norm
    for feature in (0, 7):
        line = torch.stack([new[:, feature], torch.ones(len(new))], 1)
        slope, constant = torch.linalg.lstsq(line, old[:, feature]).solution
        assert norm.scale[feature].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-4)
        assert norm.shift[feature].item() == pytest.approx(constant.item(), rel=1e-3, abs=1e-4)


def test_features_that_never_change_are_shifted_only() -> None:
    dense, model = four_blocks(), four_blocks()
    share_blocks(model, [Share(1, 0, 32)], width=32)
    block = model.model.layers[1]
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer = block.get_submodule(name)
            layer.donor = (copy.deepcopy(layer.donor[0]),)
            layer.donor[0].weight[0] = 0
            layer.factor_b[0] = 0
    normalise_updates(model, dense, [Share(1, 0, 32)], BATCHES)
    norm = block.update_norm
    assert norm.scale[0] == 1
    assert norm.shift[0].item() == pytest.approx(torch.cat(updates(dense, 1))[:, 0].mean().item(), abs=1e-5)
    assert torch.isfinite(norm.scale).all()


def test_full_rank_needs_no_normalisation() -> None:
    dense, model = four_blocks(), four_blocks()
    shares = [Share(1, 0, 32)]
    share_blocks(model, shares, width=32)
    normalise_updates(model, dense, shares, BATCHES)
    norm = model.model.layers[1].update_norm
    assert torch.allclose(norm.scale, torch.ones(32), atol=1e-4)
    assert torch.allclose(norm.shift, torch.zeros(32), atol=1e-4)


def test_wrong_shares_are_refused() -> None:
    model = four_blocks()
    for shares, message in (
        ([Share(4, 0, 2)], "blocks 0 to 3 can share, each once"),
        ([Share(1, 0, 2), Share(1, 2, 2)], "blocks 0 to 3 can share, each once"),
        ([Share(1, 0, 2), Share(2, 1, 2)], "block 1 gives up its own matrices"),
        ([Share(1, 1, 2)], "block 1 gives up its own matrices"),
        ([Share(1, 0, 33)], "rank must be between 1 and 32, the full rank of the layers, got 33"),
        ([Share(1, 0, 0)], "rank must be between 1 and 32"),
    ):
        with pytest.raises(ValueError, match=message):
            check_shares(model, shares)
    with pytest.raises(ValueError, match="rank must be between 1 and 32"):
        FlexiGPT(num_blocks=1, rank=40).plan(model, NOTHING, BATCHES, progress=False)
    with pytest.raises(ValueError, match="differences of rank 17 hold 7792 numbers per block, its own matrices 7680"):
        FlexiGPT(num_blocks=1, rank=17).plan(model, NOTHING, BATCHES, progress=False)
    with pytest.raises(ValueError, match="num_blocks must be between 1 and 3"):
        FlexiGPT(num_blocks=4).plan(model, NOTHING, BATCHES, progress=False)
    with pytest.raises(ValueError, match="does not search"):
        FlexiGPT(num_blocks=1).plan(model, NOTHING, BATCHES, state_file="x")
    if STACKS_EXPERTS:
        with pytest.raises(ValueError, match="most weights of block 0 are not in linear layers"):
            FlexiGPT(num_blocks=1, rank=2).plan(tiny_model("qwen3_moe"), NOTHING, BATCHES, progress=False)
    with pytest.raises(ValueError, match=r"block 1 is to share .* cannot express; export with format per_layer"):
        shrink(model, Plan(share=(Share(1, 0, 2),)), structure=discover(model))


def test_the_recipe_says_what_the_class_does() -> None:
    recipe = Recipe.load("structured/flexigpt")
    assert recipe.shrink is not None
    assert recipe.shrink.method == FlexiGPT(num_blocks=2, rank=16, fit="least_squares")
    assert recipe.export is not None
    assert recipe.export.format == "per_layer"


@pytest.mark.long
def test_normalisation_helps_a_trained_model() -> None:
    model = stories3m()
    calibration, test = sampled(model, seed=1, num=64), sampled(model, seed=2, num=64)
    plan = FlexiGPT(num_blocks=1, rank=32).plan(model, NOTHING, calibration, progress=False)
    assert [share.layer for share in plan.share] == [2]  # the block of the smallest influence
    shared = copy.deepcopy(model)
    share_blocks(shared, plan.share, width=192)
    before = math.exp(NextTokenLoss().prepare(shared, test)(nullcontext))
    normalise_updates(shared, model, plan.share, calibration)
    after = math.exp(NextTokenLoss().prepare(shared, test)(nullcontext))
    assert after < 0.8 * before
    fitted = [dataclasses.replace(share, fit="least_squares") for share in plan.share]
    normalise_updates(shared, model, fitted, calibration)
    assert math.exp(NextTokenLoss().prepare(shared, test)(nullcontext)) < 17.7  # without the block
    assert len(find_blocks(shared)) == 6
