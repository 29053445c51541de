"""Two processes hold the masks of one: DDP and FSDP2, saving and resuming, and what is refused."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from lightning_prune.base import distributed
from lightning_prune.recipe.recipe import Recipe
from tests.parallel_training import (
    NUM_STEPS,
    Outcome,
    Stack,
    Training,
    Way,
    micro_batches,
    recipe,
    train_through,
    wrap,
)
from tests.processes import Processes


def scorer(name: str, **options: Any) -> dict[str, Any]:
    return {"scorer": {"class_path": name, "init_args": options}}


def without(*patterns: str) -> dict[str, Any]:
    return {"targets": {"exclude": [f"layers.*.{pattern}.weight" for pattern in patterns]}}


def block(rows: int) -> dict[str, Any]:
    return {"granularity": {"class_path": "Block", "init_args": {"rows": rows, "cols": 4}}}


TWO_OF_FOUR = {"granularity": {"class_path": "NM", "init_args": {"n": 2, "m": 4}}}
NOT_IN_BLOCKS = without("odd", "mix", "single")
CASES: dict[str, dict[str, Any]] = {
    "magnitude_row": scorer("Magnitude", scope="row"),
    "magnitude_tensor": scorer("Magnitude", scope="tensor"),
    "magnitude_global": scorer("Magnitude", scope="global"),
    "tied_embedding": scorer("Magnitude", scope="global") | {"targets": {"include": ["embed.weight", "*.odd.weight"]}},
    "two_of_four": TWO_OF_FOUR | without("mix"),
    "two_of_four_wanda": TWO_OF_FOUR | scorer("Wanda") | without("mix", "experts"),
    "flat_block": block(1) | without("mix"),
    "block_row": block(4) | scorer("Magnitude", scope="row") | NOT_IN_BLOCKS,
    "block_tensor": block(4) | scorer("Magnitude", scope="tensor") | NOT_IN_BLOCKS,
    "block_global_taylor": block(4) | scorer("Taylor", scope="global") | NOT_IN_BLOCKS,
    "wanda": scorer("Wanda") | without("experts"),
    "wanda_owl": scorer("Wanda") | {"allocation": "OWL"} | without("experts"),
    "taylor": scorer("Taylor"),
    "gradient": scorer("Gradient"),
    "movement": scorer("Movement"),
    "random": scorer("Random"),
    "global_rank": {"allocation": {"class_path": "GlobalRank", "init_args": {"min_density": 0.3}}},
    "erdos_renyi": {"allocation": "ErdosRenyi"},
}
SLOW = {"block_row", "erdos_renyi", "flat_block", "movement"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


def assert_same_masks(one: Outcome, other: Outcome) -> None:
    assert one.masks.keys() == other.masks.keys()
    differing = [name for name in one.masks if not torch.equal(one.masks[name], other.masks[name])]
    assert not differing, f"masks differ: {differing}"


def assert_close_weights(one: Outcome, other: Outcome) -> None:
    for name, weight in one.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=0, atol=1e-11, msg=lambda m, name=name: name + m)


def assert_same(one: Any, other: Any) -> None:
    """Check that two states are equal, tensors bit for bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_two_processes_hold_the_masks_of_one(ranks: Processes, case: str, way: Way) -> None:
    source = recipe(**CASES[case])
    one = train_through(source, "one")
    assert sum(int((~mask).sum()) for mask in one.masks.values()) > 0
    first, second = ranks.run(train_through, source, way)
    assert_same_masks(one, first)
    assert_close_weights(one, first)
    assert_same(first.state, second.state)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in one.weights)
    assert first.state["digest"] == one.state["digest"]
    assert first.state["shapes"] == one.state["shapes"]
    same = [entry["sparsity"] for entry in one.state["history"]]
    assert [entry["sparsity"] for entry in first.state["history"]] == same


def resume_from(path: str, source: dict[str, Any], way: Way) -> Outcome:
    training = Training(source, way)
    training.load(path)
    training.attach()
    assert_same(training.conductor.state_dict(), torch.load(path, weights_only=True)["pruning"])
    training.train()
    return training.outcome()


def save_on_the_way(path: str, source: dict[str, Any], way: Way) -> Outcome:
    training = Training(source, way)
    training.attach()
    training.train(2)
    training.save(path)
    training.train()
    return training.outcome()


@pytest.mark.parametrize(
    ("case", "way"), [("taylor", "fsdp"), ("wanda", "fsdp"), ("block_tensor", "fsdp"), ("wanda", "ddp")]
)
def test_a_resume_in_one_process_or_two_equals_no_pause(ranks: Processes, tmp_path: Path, case: str, way: Way) -> None:
    source, path = recipe(**CASES[case]), str(tmp_path / "saved.pt")
    whole, _ = ranks.run(save_on_the_way, path, source, way)
    in_one = resume_from(path, source, "one")
    assert_same_masks(whole, in_one)
    assert_close_weights(whole, in_one)
    in_two, _ = ranks.run(resume_from, path, source, way)
    assert_same(whole.state, in_two.state)
    assert_same(whole.weights, in_two.weights)


def test_saved_state_holds_whole_plain_tensors(ranks: Processes, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.pt")
    ranks.run(save_on_the_way, path, recipe(**CASES["taylor"]), "fsdp")
    saved = torch.load(path, weights_only=True)["pruning"]
    assert saved["step"] == 2
    for name, shape in saved["shapes"].items():
        numel = math.prod(shape)
        assert type(saved["masks"][name]) is Tensor
        assert saved["masks"][name].numel() == -(-numel // 8)
        assert saved["statistics"][name]["weight_grad"]["average"].shape == torch.Size(shape)
        num_kept = sum(int(byte).bit_count() for byte in saved["masks"][name])
        assert num_kept == numel - int(0.2 * numel)


def drift(way: Way) -> str:
    training = Training(recipe(), way)
    training.attach()
    training.train(2)
    if dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in training.model.parameters():
                distributed.local(parameter.detach()).uniform_()
    with pytest.raises(RuntimeError) as error:
        training.train()
    return str(error.value)


@pytest.mark.parametrize("way", ["ddp", "hsdp"])
def test_masks_that_differ_between_ranks_are_an_error(ranks: Processes, way: Way) -> None:
    for message in ranks.run(drift, way):
        assert message.startswith("ranks hold different masks for 'layers.0.up.weight' (14 in all)")


def refused(kind: str) -> str:
    model: nn.Module = Stack()
    if kind == "fsdp1":
        model.layers[0] = FullyShardedDataParallel(model.layers[0], device_id=torch.device("cpu"))
    elif kind == "columns":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(p.ndim - 1))
    else:
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"layers.*.down": RowwiseParallel()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    conductor = Recipe.load(recipe()).sparsifier()
    with pytest.raises(ValueError) as error:
        conductor.attach(model, [optimizer], total_steps=NUM_STEPS)
    assert not conductor.is_attached
    return str(error.value)


def test_placements_that_cannot_hold_masks_are_refused(ranks: Processes) -> None:
    assert ranks.run(refused, "fsdp1")[0].startswith("module 'layers.0' is wrapped by FSDP1")
    assert "layers.0.down.weight is placed as (Shard(dim=1),)" in ranks.run(refused, "tensor_parallel")[0]
    assert "embed.weight is placed as (Shard(dim=1),)" in ranks.run(refused, "columns")[0]


def evaluate_around(way: Way) -> tuple[Outcome, float]:
    """Run the model without a backward pass before, between and after training steps, as trainers do."""
    training = Training(recipe(), way)

    def evaluate() -> None:
        with torch.no_grad():
            training.model(micro_batches(0, way)[0])

    evaluate()
    training.attach()
    for last in range(1, NUM_STEPS + 1):
        training.train(last)
        evaluate()
    outcome = training.outcome()
    return outcome, training.conductor.report().sparsity


@pytest.mark.parametrize("way", ["fsdp", "fsdp_root"])
def test_evaluation_leaves_no_gathered_weights_behind(ranks: Processes, way: Way) -> None:
    one = train_through(recipe(), "one")
    (outcome, sparsity), _ = ranks.run(evaluate_around, way)
    assert_same_masks(one, outcome)
    assert_close_weights(one, outcome)
    zeros = sum(int((~mask).sum()) for mask in one.masks.values())
    assert sparsity == zeros / sum(mask.numel() for mask in one.masks.values())


def guard_decides(values: tuple[float, float]) -> tuple[float, list[str]]:
    guard = {"metric": "loss", "max": 1.0, "action": "rollback"}
    training = Training(recipe(guard=guard), "ddp")
    training.attach()
    training.train(1)
    training.conductor.observe({"loss": 0.5})
    training.train(3)
    training.conductor.observe({"loss": values[dist.get_rank()]})
    training.train()
    notes = list(training.conductor.notes)
    training.conductor.detach()
    return training.conductor.report().sparsity, notes


def test_the_guard_follows_the_first_rank(ranks: Processes) -> None:
    first, second = ranks.run(guard_decides, (5.0, 0.5))
    assert first == second
    assert first[0] == pytest.approx(0.2, abs=0.01)
    assert first[1] == ["step 3: loss = 5 crossed its bound; pruning goes back from sparsity 0.5 to the masks of 0.2"]
    first, second = ranks.run(guard_decides, (0.5, float("nan")))
    assert first == second
    assert first == (pytest.approx(0.5, abs=0.01), [])


def nan_on_one_rank() -> str:
    training = Training(recipe(scorer={"class_path": "Magnitude", "init_args": {"scope": "row"}}), "fsdp")
    training.attach()
    training.train(2)
    rows = distributed.local(training.model.layers[1].tall.weight.detach())
    with pytest.raises(ValueError) as error:
        if dist.get_rank() == 1:
            rows[0, 0] = torch.nan
        training.conductor._held._after_step(training.optimizer, (), {})
    training.conductor.detach()
    return str(error.value)


def test_a_score_that_is_nan_on_one_rank_stops_all(ranks: Processes) -> None:
    for message in ranks.run(nan_on_one_rank):
        assert message.startswith("scores of layers.1.tall.weight contain NaN")


def fail_on_one_rank(way: Way) -> tuple[bool, bool]:
    training = Training(recipe(), way)
    training.attach()
    training.train(3)
    if dist.get_rank() == 0:  # the other is elsewhere, and answers no question
        training.conductor.detach(has_failed=True)
    attached = training.conductor.is_attached
    dist.barrier()
    training.conductor.detach(has_failed=True)
    return attached, any(parameter._post_accumulate_grad_hooks for parameter in training.model.parameters())


@pytest.mark.slow
def test_an_error_on_one_rank_detaches_it_alone(ranks: Processes) -> None:
    assert ranks.run(fail_on_one_rank, "fsdp") == [(False, False), (True, False)]


class FlatOptimizer:
    """Steps one flat copy of all weights with a torch optimizer and writes it back, as DeepSpeed's ZeRO does."""

    def __init__(self, model: nn.Module) -> None:
        flat = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
        self.optimizer = torch.optim.SGD([flat], lr=0.1)


def test_an_optimizer_of_copies_is_refused() -> None:
    model = Stack()
    conductor = Recipe.load(recipe()).sparsifier()
    with pytest.raises(ValueError, match=r"step none of the targets, not even layers\.0\.up\.weight"):
        conductor.attach(model, [FlatOptimizer(model)], total_steps=NUM_STEPS)
    assert not conductor.is_attached


class Routed(nn.Module):
    """Two experts, of which a batch uses the one that its first number chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_TI: Tensor) -> Tensor:
        return self.experts[int(input_TI[0, 0] > 0)](input_TI)


class RoutedStack(nn.Module):
    """Blocks of experts, behind a first one that every batch passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), Routed()]).double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layers[0](inputs)
        return self.layers[1](torch.cat([inputs[:, :1], hidden[:, 1:]], dim=1))


def routed_batches() -> list[dict[str, Tensor]]:
    """Return two batches for the first expert, then two for the second."""
    inputs = torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs[:2, 0, 0], inputs[2:, 0, 0] = -1, 1
    return [{"inputs": input_TI} for input_TI in inputs]


def prune_routed_once(first: int, last: int, source: dict[str, Any]) -> dict[str, Tensor]:
    conductor = Recipe.load(source).sparsifier()
    model = RoutedStack()
    conductor.prune_once(model, routed_batches()[first:last], progress=False)
    return dict(conductor.masks)


def prune_routed_in_turn(source: dict[str, Any]) -> dict[str, Tensor]:
    half = dist.get_rank() * 2
    return prune_routed_once(half, half + 2, source)


def test_calibration_over_ranks_that_reach_different_layers(ranks: Processes) -> None:
    source = {"prune": {"scorer": "Wanda", "schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5}}}}
    one = prune_routed_once(0, 4, source)
    for masks in ranks.run(prune_routed_in_turn, source):
        assert_same(one, masks)


def prune_sharded_once(source: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    model = wrap(Stack(), "fsdp")
    conductor = Recipe.load(source).sparsifier()
    report = conductor.prune_once(model, micro_batches(0, "fsdp"), progress=False)
    return distributed.whole_state_dict(model), report.sparsity


def test_a_sharded_model_is_pruned_once_from_its_weights(ranks: Processes) -> None:
    once = {"schedule": {"class_path": "Once", "init_args": {"sparsity": 0.5}}}
    source = {"prune": once | CASES["magnitude_global"]}
    model = Stack()
    report = Recipe.load(source).sparsifier().prune_once(model, progress=False)
    for weights, sparsity in ranks.run(prune_sharded_once, source):
        assert sparsity == report.sparsity
        assert_same(weights, dict(model.state_dict()))
