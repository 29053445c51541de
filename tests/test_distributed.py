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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from tests.parallel_training import (
    NUM_STEPS,
    Outcome,
    Stack,
    Training,
    Way,
    micro_batches,
    recipe,
    train_through,
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
@pytest.mark.parametrize("case", CASES)
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
