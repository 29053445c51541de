"""Instruction-following pruning in two processes, whole and sharded: the same masks and weights as in one."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.base import distributed
from lightning_prune.conditional.instruction import Instruction, Predictor, Start
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.prompt import Reads
from lightning_prune.structured.structure import Stack
from tests.processes import Processes
from tests.tiny_models import tiny_llama, token_windows

NUM_STEPS, BATCH = 4, 4
Way = Literal["one", "ddp", "fsdp"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


def batches(first: int, size: int) -> Iterator[dict[str, Tensor]]:
    for ids in token_windows(BATCH * NUM_STEPS).split(BATCH):
        part = ids[first : first + size]
        labels = part.clone()
        labels[:, :5] = -100
        yield {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": labels}


def trained(way: Way) -> tuple[dict[str, Tensor], list[float]]:
    """Train with a predictor; return whole weights and what the guard measures."""
    model = tiny_llama(tied=False)
    options = Instruction(
        budget=Budget(keep=0.5),
        predictor=Predictor(hidden=8),
        reads=Reads(dropout=0.3),
        start=Start(num_sequences=8, num_clusters=2, num_steps=20),
        ramp=0.5,
    )
    torch.manual_seed(1)
    condition = options.insert(model, Stack((), "", (), 2))
    size = BATCH if way == "one" else BATCH // 2
    first = 0 if way == "one" else size * dist.get_rank()
    trainee: nn.Module = model
    if way == "ddp":
        trainee = DistributedDataParallel(model)
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    condition.begin(total_steps=NUM_STEPS)
    condition.warm_start(list(batches(first, size))[:2])
    trainee.train()
    for batch in batches(first, size):
        trainee(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    found = condition.measure(next(batches(first, size)))
    return distributed.whole_state_dict(model), [found.overlap, found.spread]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(ranks: Processes, way: Way) -> None:
    (expected, _) = trained("one")
    (first, seen), (second, also) = ranks.run(trained, way)
    assert seen == also  # all ranks decide alike
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(first[name], second[name]), name
