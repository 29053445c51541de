"""Every structured method keeps one contract: from discovered structure to a plan that shrink carries out."""

import dataclasses
import importlib
import inspect
from dataclasses import FrozenInstanceError, is_dataclass

import pytest
import torch

from lightning_prune.base import registry
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.random import Random
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.structured.depth.fuse import FuseGPT, FuseTraining
from lightning_prune.structured.depth.methods import SLEB, BlockPruner, FinerCut, RemoveTail, ShortGPT
from lightning_prune.structured.depth.multipruner import MultiPruner
from lightning_prune.structured.depth.replace import ReplaceMe
from lightning_prune.structured.depth.search import Stop
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.method import StructuredMethod
from lightning_prune.structured.overview import overview, refusals
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.width.block_by_block import prune_width
from lightning_prune.structured.width.method import Width
from tests.structured.depth_models import padded_batches, shake
from tests.tiny_models import tiny_family, tiny_llama

BATCHES = padded_batches(8)
METHODS: dict[StructuredMethod, tuple[int, int]] = {  # -> layers and feed-forward width that stay
    ShortGPT(num_blocks=1): (3, 48),
    RemoveTail(num_blocks=2): (2, 48),
    SLEB(stop=Stop(count=1)): (3, 48),
    ReplaceMe(num_blocks=1): (3, 48),
    FuseGPT(share=0.5, training=FuseTraining(rank=2, epochs=1)): (2, 48),
}


def test_the_room_lists_every_method_with_a_source() -> None:
    offered = {entry.cls.__name__: entry for entry in registry.entries("structured")}
    known = {
        "BlockPruner",
        "FinerCut",
        "FuseGPT",
        "MambaShedder",
        "MultiPruner",
        "RemoveTail",
        "ReplaceMe",
        "SLEB",
        "ShortGPT",
        "Width",
    }
    assert offered.keys() >= known
    for name, entry in offered.items():
        assert "arXiv" in entry.source, f"{name} has no Source: line"
        assert is_dataclass(entry.cls), f"{name} is no dataclass"
        assert list(inspect.signature(entry.cls.plan).parameters) == list(
            inspect.signature(StructuredMethod.plan).parameters
        )
    assert "arXiv 2402.09025" in offered["SLEB"].source
    assert "2403.03853" not in offered["SLEB"].source
    assert {entry.cls.__name__ for entry in registry.entries("structured.depth.criteria")} >= {
        "NextTokenLoss",
        "JensenShannon",
    }
    assert [entry.cls.__name__ for entry in registry.entries("solvers.greedy_output")] == [
        "GreedyOutput",
        "OutputEnergy",
    ]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_depth_plans_are_carried_out(method: StructuredMethod) -> None:
    model = tiny_llama(layers=4).eval()
    shake(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure = discover(model)
    plan = method.plan(model, structure, BATCHES, progress=False)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) == method.repairs
    small = shrink(model, plan, structure=structure)
    assert (small.config.num_hidden_layers, small.config.intermediate_size) == METHODS[method]


def test_blocks_that_the_class_cannot_do_without_stay() -> None:
    model = tiny_llama(layers=4).eval()
    shake(model)
    free = discover(model)
    for method in (ShortGPT(num_blocks=1), SLEB(stop=Stop(count=1), protect_first=0, protect_last=0)):
        first = set(range(4)) - set(method.plan(model, free, BATCHES, progress=False).layers or ())
        assert free.stack is not None
        stack = dataclasses.replace(free.stack, kept_always=dict.fromkeys(first, "it is special"))
        other = dataclasses.replace(free, stack=stack)
        second = set(range(4)) - set(method.plan(model, other, BATCHES, progress=False).layers or ())
        assert len(second) == 1
        assert first != second
        none = dataclasses.replace(
            free, stack=dataclasses.replace(stack, kept_always=dict.fromkeys(range(4), "special"))
        )
        with pytest.raises(ValueError, match="no block can be removed: special"):
            method.plan(model, none, BATCHES, progress=False)


def test_methods_that_mix_shapes_plan_from_a_structure() -> None:
    model = tiny_llama(layers=4).eval()
    shake(model)
    structure = discover(model)
    for method in (
        BlockPruner(stop=Stop(count=1)),
        FinerCut(stop=Stop(count=1)),
        MultiPruner(parameter_share=0.1, ffn_step=8),
    ):
        plan = method.plan(model, structure, BATCHES, progress=False)
        assert plan.skip or plan.cuts
        with pytest.raises(ValueError, match="per-layer shapes"):
            shrink(model, plan, structure=structure)


def test_width_does_what_its_function_does() -> None:
    one, two = tiny_llama().eval(), tiny_llama().eval()
    structure = discover(one)
    method = Width(sparsity={"ffn": 0.25, "heads": 0.5}, multiple_of=4)
    plan = method.plan(one, structure, BATCHES, progress=False)
    groups = list(structure.groups.values())
    options = {"scorer": Wanda(), "sparsity": {"ffn": 0.25, "heads": 0.5}, "multiple_of": 4, "progress": False}
    assert plan == prune_width(two, groups, BATCHES, **options)  # type: ignore[arg-type]
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    small = shrink(one, plan, structure=structure)
    assert (small.config.intermediate_size, small.config.num_attention_heads) == (36, 2)


def test_what_a_method_needs_and_leaves_behind() -> None:
    assert not RemoveTail(num_blocks=1).needs_batches
    assert ShortGPT(num_blocks=1).needs_batches
    weights = Width(sparsity={"ffn": 0.5}, scorer=Magnitude(), compensate="none")
    assert (weights.needs_batches, weights.repairs) == (False, False)
    assert Width(sparsity={"ffn": 0.5}, compensate="none").needs_batches
    assert Width(sparsity={"ffn": 0.5}, scorer=Random()).repairs
    assert weights.plan(tiny_llama(), discover(tiny_llama()), [], progress=False).cuts
    with pytest.raises(FrozenInstanceError):
        weights.seed = 3  # type: ignore[misc]


def test_kinds_that_cannot_be_cut_leave_the_model_alone() -> None:
    model = tiny_family("gpt2").eval()
    structure = discover(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"heads cannot be cut: no shape follows n_head alone; .*can be cut: ffn, layers"
    ):
        Width(sparsity={"ffn": 0.5, "heads": 0.5}).plan(model, structure, BATCHES, progress=False)
    with pytest.raises(ValueError, match=r"unknown group 'transformer.h.9.mlp:ffn'; did you mean"):
        Width(sparsity={"ffn": 0.5}, budget={"transformer.h.9.mlp:ffn": 0.5}).plan(model, structure, BATCHES)
    with pytest.raises(ValueError, match="does not search, so there is no state to keep"):
        Width(sparsity={"ffn": 0.5}).plan(model, structure, BATCHES, state_file="x")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sparsity_that_would_empty_a_layer_leaves_the_model_alone() -> None:
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"sparsity must be in \[0, 1\), got {share} for heads"):
            Width(sparsity={"ffn": 0.5, "heads": share})
    with pytest.raises(ValueError, match="sparsity names no kind of unit"):
        Width(sparsity={})
    model = tiny_llama().eval()
    structure = discover(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in (
        Width(sparsity={"ffn": 0.99}, budget="global"),
        Width(sparsity={"ffn": 0.5}, budget={"model.layers.1.mlp:ffn": 1.0}),
    ):
        with pytest.raises(ValueError, match="sparsity"):
            method.plan(model, structure, BATCHES, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_overview_counts_what_can_be_cut() -> None:
    assert overview(discover(tiny_llama())) == [
        ("kind", "groups", "units", "parts", "fields"),
        ("kv_groups", "2", "2", "1", "num_key_value_heads, num_attention_heads"),
        ("heads", "2", "4", "2", "num_attention_heads"),
        ("ffn", "2", "48", "1", "intermediate_size"),
        ("hidden", "1", "32", "1", "hidden_size"),
        ("layers", "1", "2", "1", "num_hidden_layers"),
    ]
    refused = refusals(discover(tiny_family("gpt2")))
    assert refused[0] == "heads: no shape follows n_head alone; the head size is not a field of its own"


def test_contracts_of_rooms_above_the_registry_are_what_they_say() -> None:
    assert registry.contract("structured") is StructuredMethod
    module = importlib.import_module("lightning_prune.structured.depth.criteria")
    assert registry.contract("structured.depth.criteria") is module.Criterion
