"""Any copy of a pruned model can be compared with its masks, whatever its names begin with."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import Once, Sparsifier, Targets
from tests.tiny_models import tiny_llama, tiny_mlp

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def pruned() -> tuple[nn.Module, Sparsifier]:
    model, conductor = nn.ModuleDict({"net": tiny_llama()}), Sparsifier(schedule=Once(sparsity=0.5))
    conductor.prune_once(model)
    return model, conductor


def test_the_model_its_parts_and_its_copies_are_as_promised(pruned: tuple[nn.Module, Sparsifier]) -> None:
    model, conductor = pruned
    around = nn.ModuleDict({"outer": nn.ModuleDict({"student": model})})
    for copied in (model, model["net"], around, AveragedModel(model), torch.compile(model, backend="eager")):
        assert conductor.verify(copied) == ()
        assert conductor.verify(copied.state_dict()) == ()


def test_a_weight_that_came_back_is_named_and_counted(pruned: tuple[nn.Module, Sparsifier]) -> None:
    model, conductor = pruned
    average = copy.deepcopy(model)
    weight = dict(average["net"].named_parameters())[NAME]
    pruned_at = (~conductor.masks[f"net.{NAME}"]).nonzero()
    with torch.no_grad():
        weight[tuple(pruned_at[0])], weight[tuple(pruned_at[1])] = 1e-9, float("nan")
    num_pruned = sum(int((~mask).sum()) for mask in conductor.masks.values())
    expected = (f"2 of {num_pruned} pruned weights are not zero, in 1 targets, first net.{NAME}",)
    assert conductor.verify(average) == conductor.verify(average["net"].state_dict()) == expected
    assert conductor.verify(model) == ()


def test_what_is_missing_or_has_another_shape_is_named(pruned: tuple[nn.Module, Sparsifier]) -> None:
    model, conductor = pruned
    state = model["net"].state_dict()
    del state["model.layers.0.self_attn.q_proj.weight"]
    state[NAME] = state[NAME][:, 1:]
    assert conductor.verify(state) == (
        "1 pruned targets are not in the model, first net.model.layers.0.self_attn.q_proj.weight",
        f"1 pruned targets have another shape in the model, first net.{NAME}",
    )
    assert len(conductor.verify(tiny_mlp())) == 1


def test_a_tied_weight_may_be_saved_under_either_name() -> None:
    model, conductor = tiny_llama(), Sparsifier(schedule=Once(sparsity=0.5), targets=Targets(include=("lm_head.*",)))
    conductor.prune_once(model)
    state = model.state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert conductor.verify({name: state[name]}) == ()
        assert len(conductor.verify({name: state[name] + 1})) == 1
