"""Which block goes, what its neighbours become, and golden perplexities of a trained model."""

import copy
import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.depth.bypass import bypassed
from lightning_prune.structured.depth.criteria import NextTokenLoss
from lightning_prune.structured.depth.fuse import FuseGPT, FuseTraining, macro_influence, neighbours
from lightning_prune.structured.depth.fusing import HiddenDivergence, HiddenLoss, HiddenSquaredError
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.shrink import shrink
from tests.processes import Processes
from tests.structured.depth_models import (
    NOTHING,
    fuse_on_rank,
    padded_batches,
    sampled,
    shake,
    stories3m,
    tiny_model,
)
from tests.tiny_models import STACKS_EXPERTS, tiny_llama

BATCHES = padded_batches(6)
SHORT = FuseTraining(rank=4, epochs=4, learning_rate=1e-3, coefficient_learning_rate=1e-2, batch_size=2)


def four_blocks() -> PreTrainedModel:
    model = tiny_llama(layers=4)
    shake(model)
    return model.eval()


def test_neighbours_are_around_the_block() -> None:
    layers = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert neighbours(layers, 6, 8) == [1, 2, 4, 5, 6, 7, 8, 9]
    assert neighbours(layers, 6, 3) == [5, 6, 7]
    assert neighbours(layers, 0, 8) == [0, 1, 2, 4]
    assert neighbours(layers, 10, 8) == [6, 7, 8, 9, 10]


def test_macro_influence_is_the_angle_of_the_final_hidden_state() -> None:
    model = four_blocks()

    def final(gone: list[int]) -> torch.Tensor:
        seen = []
        with bypassed(model, (), layers=gone), torch.no_grad():
            handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            for batch in BATCHES:
                model(**batch)
            handle.remove()
        masks = [batch["attention_mask"].bool() for batch in BATCHES]
        return torch.cat([state[mask] for state, mask in zip(seen, masks, strict=True)])

    for removed in ([], [1]):
        candidates = [0, 3]
        cosines = [torch.cosine_similarity(final(removed), final([*removed, c]), dim=-1).mean() for c in candidates]
        found = macro_influence(model, BATCHES, candidates, removed)
        assert found == pytest.approx([1 - float(value) for value in cosines], abs=1e-6)


def test_a_block_that_does_nothing_goes_first_at_no_loss() -> None:
    model = four_blocks()
    nn.init.zeros_(model.model.layers[2].self_attn.o_proj.weight)
    nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    before = model(**BATCHES[0]).logits.detach()
    plan = FuseGPT(num_blocks=1, training=SHORT).plan(model, NOTHING, BATCHES, progress=False)
    assert plan.layers == (0, 1, 3)
    assert plan.method["losses"][0] == pytest.approx([0] * 4, abs=1e-8)
    with bypassed(model, (), layers=[2]):
        assert torch.allclose(model(**BATCHES[0]).logits, before, atol=1e-3)


def _state_after(model: nn.Module, gone: list[int], last: int, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with bypassed(model, (), layers=gone), torch.no_grad():
        handle = model.model.layers[last].register_forward_hook(lambda m, a, output: seen.append(output))
        model(**batch)
        handle.remove()
    return seen[0]


def loss_to_dense(model: nn.Module, dense: nn.Module, layer: int, last: int) -> float:
    """Return the mean squared error of the stream after block `last`, without block `layer`, over real tokens."""
    total, count = 0.0, 0
    for batch in BATCHES:
        whole, fused = (
            _state_after(one, gone, last, batch)[batch["attention_mask"].bool()]
            for one, gone in ((dense, []), (model, [layer]))
        )
        total, count = total + float((whole - fused).double().square().sum()), count + whole.numel()
    return total / count


@pytest.mark.parametrize("loss", [HiddenSquaredError(), HiddenDivergence()])
def test_training_brings_the_group_nearer_to_what_it_was(loss: HiddenLoss) -> None:
    model, dense = four_blocks(), four_blocks()
    method = FuseGPT(num_blocks=1, training=dataclasses.replace(SHORT, loss=loss, epochs=10))
    plan = method.plan(model, NOTHING, BATCHES, progress=False)
    (layer,), (group,) = plan.method["order"], plan.method["groups"]
    assert group == neighbours(range(4), layer, 8)
    losses = plan.method["losses"][0]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    deleted = loss_to_dense(dense, dense, layer, group[-1])
    assert loss_to_dense(model, dense, layer, group[-1]) < deleted


def test_no_learning_is_plain_deletion() -> None:
    model, dense = four_blocks(), four_blocks()
    training = dataclasses.replace(SHORT, learning_rate=0.0, coefficient_learning_rate=0.0)
    plan = FuseGPT(num_blocks=2, training=training).plan(model, NOTHING, BATCHES, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    (first, second), groups = plan.method["order"], plan.method["groups"]
    assert plan.method["losses"][0][0] == pytest.approx(loss_to_dense(dense, dense, first, groups[0][-1]), rel=1e-4)
    assert first not in groups[1]
    assert second in groups[1]
    assert len(plan.method["influence"][1]) == 3


def test_only_the_neighbours_change_and_padding_counts_for_nothing() -> None:
    models = [four_blocks() for _ in range(2)]
    padded = copy.deepcopy(BATCHES)
    for batch in padded:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    plans = [
        FuseGPT(num_blocks=1, group_size=3, training=SHORT).plan(model, NOTHING, batches, progress=False)
        for model, batches in zip(models, (BATCHES, padded), strict=True)
    ]
    pairs = zip(models[0].named_parameters(), models[1].named_parameters(), strict=True)
    for (_, one), (_, two) in pairs:
        assert torch.allclose(one, two, atol=1e-5)
    (group,), (layer,) = plans[0].method["groups"], plans[0].method["order"]
    dense = four_blocks().state_dict()
    changed = {name for name, value in models[0].state_dict().items() if not torch.equal(value, dense[name])}
    assert {int(name.split(".")[2]) for name in changed} == set(group) - {layer}
    assert all(parameter.grad is None for parameter in models[0].parameters())
    assert f"model.layers.{next(iter(set(group) - {layer}))}.input_layernorm.weight" in changed


def test_bfloat16_models_are_fused_in_float32() -> None:
    model = four_blocks().to(torch.bfloat16)
    exact, method = four_blocks(), FuseGPT(num_blocks=1, training=SHORT)
    plan, wanted = (method.plan(one, discover(one), BATCHES, progress=False) for one in (model, exact))
    assert plan.method["losses"][0] == pytest.approx(wanted.method["losses"][0], rel=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert shrink(model, plan).config.num_hidden_layers == 3


def refuse(method: FuseGPT, model: nn.Module, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        method.plan(model, NOTHING, BATCHES, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrong_options_are_refused() -> None:
    model = four_blocks()
    for options, message in (
        ({}, "give num_blocks or share, got num_blocks=None and share=None"),
        ({"num_blocks": 1, "share": 0.5}, "give num_blocks or share"),
        ({"share": 1.0}, r"share must be in \(0, 1\), got 1.0"),
        ({"num_blocks": 1, "group_size": 2}, "group_size must be >= 3"),
        ({"num_blocks": 1, "num_score_batches": 0}, "num_score_batches must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FuseGPT(**options)
    refuse(FuseGPT(num_blocks=4), model, "num_blocks must be between 1 and 3 for 4 blocks, got 4")
    refuse(
        FuseGPT(num_blocks=1),
        model,
        "rank 128 is larger than the smaller dimension of self_attn.k_proj; give a rank of at most 16",
    )
    for name, value in (("epochs", 0), ("rank", 0), ("batch_size", 0), ("learning_rate", -1.0)):
        with pytest.raises(ValueError, match=f"{name} must be . or more, got {value}"):
            dataclasses.replace(SHORT, **{name: value})
    with pytest.raises(ValueError, match="FuseGPT does not search"):
        FuseGPT(num_blocks=1, training=SHORT).plan(model, NOTHING, BATCHES, state_file="x")
    with pytest.raises(ValueError, match="no calibration batches"):
        FuseGPT(num_blocks=1, training=SHORT).plan(model, NOTHING, [])


def test_models_that_cannot_be_fused_are_refused() -> None:
    method = FuseGPT(num_blocks=1, training=dataclasses.replace(SHORT, rank=2))
    if STACKS_EXPERTS:
        refuse(method, tiny_model("qwen3_moe"), "most weights of block 0 are not in linear layers")


@pytest.mark.long
def test_two_processes_fuse_as_one_does() -> None:
    with Processes(2) as processes:
        (first, plan), (second, other) = processes.run(fuse_on_rank, 2)
    assert plan == other
    assert first == second
    alone, whole = fuse_on_rank(1)
    assert plan["method"]["order"] == whole["method"]["order"]
    assert plan["method"]["influence"][0] == pytest.approx(whole["method"]["influence"][0], rel=1e-5)
    assert torch.allclose(torch.tensor(first), torch.tensor(alone), atol=1e-5)


def test_the_recipe_says_what_the_class_does() -> None:
    recipe = Recipe.load("structured/fusegpt")
    assert recipe.shrink is not None
    method = recipe.shrink.method
    assert isinstance(method, FuseGPT)
    assert (method.num_blocks, method.training.rank) == (2, 16)
    assert method.training.loss == HiddenSquaredError()
    assert Plan.from_dict(Plan(method={"name": "FuseGPT"}).as_dict()).method["name"] == "FuseGPT"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_golden_fusion() -> None:
    model = stories3m()
    calibration, test = sampled(model, seed=1, num=64), sampled(model, seed=2, num=64)
    training = FuseTraining(rank=8, epochs=4, batch_size=2, learning_rate=1e-3, coefficient_learning_rate=1e-2)
    plan = FuseGPT(num_blocks=1, training=training).plan(model, NOTHING, calibration, progress=False)
    assert plan.method["order"] == [2]
    fused = math.exp(NextTokenLoss().prepare(model, test)(lambda: bypassed(model, [], layers=[2])))
    assert fused < 8.80  # of ReplaceMe; deleting the block gives 17.7
