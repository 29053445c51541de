"""One small training in one process, under DDP or under FSDP2, whose masks must not depend on which.

Weights are float64, so that sums in another order cannot change which weight is smaller.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from lightning_prune.base import distributed
from lightning_prune.base.masks import unpack
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.recipe.recipe import Recipe
from tests.tiny_models import VOCAB, token_windows

WIDTH = 16
NUM_STEPS = 4
NUM_MICRO_BATCHES = 2
BATCH = 4  # sequences of one micro batch, over all processes
Way = Literal["one", "ddp", "fsdp", "fsdp_root", "hsdp"]
WHOLE = StateDictOptions(full_state_dict=True)


class Experts(nn.Module):
    """Three stacked linear maps, averaged: a weight of three dimensions whose first one two does not divide."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH, dtype=torch.float64) / WIDTH)

    def forward(self, input_BTI: Tensor) -> Tensor:
        return (input_BTI @ self.weight.mean(0)).tanh()


class Layer(nn.Module):
    """Weights that do not split evenly in two, linear and transposed.

    The rows of `tall` make three blocks of four, `odd` has 4 + 3 rows, `single` leaves the second process none, and
    `mix` is transposed with 4 + 3 columns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(12, WIDTH)
        self.down = nn.Linear(12, WIDTH)
        self.tall = nn.Linear(WIDTH, 12)
        self.odd = nn.Linear(WIDTH, 7)
        self.mix = Conv1D(WIDTH, 7)
        self.single = nn.Linear(WIDTH, 1)
        self.experts = Experts()

    def forward(self, input_BTI: Tensor) -> Tensor:
        inner = self.up(input_BTI).tanh() + self.tall(input_BTI).tanh()
        hidden = input_BTI + self.down(inner)
        hidden = hidden + self.mix(self.odd(hidden).tanh()) * self.single(hidden)
        return hidden + self.experts(hidden)


class Stack(nn.Module):
    """A tiny language model with an output head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids_BT: Tensor) -> Tensor:
        hidden = self.embed(ids_BT)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def recipe(**prune: Any) -> dict[str, Any]:
    """Return a recipe that prunes 0.2 at step 1 and 0.5 at step 3 of 4, weights of all layers unless told otherwise."""
    options = {"sparsity": 0.5, "initial": 0.2, "start": 1, "end": 3, "interval": 2}
    targets = {"include": ["layers.*"]} | prune.pop("targets", {})  # `single` would pass for a gate
    return {"prune": {"schedule": {"class_path": "Linear", "init_args": options}, "targets": targets} | prune}


def wrap(model: Stack, way: Way) -> nn.Module:
    """Wrap or shard a model."""
    if way == "ddp":
        return DistributedDataParallel(model)
    if way.startswith("fsdp") or way == "hsdp":
        shape, names = ((2, 1), ("copy", "shard")) if way == "hsdp" else ((2,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in () if way == "fsdp_root" else model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def micro_batches(step: int, way: Way) -> list[Tensor]:
    """Return this process's ids_BT of one optimizer step."""
    windows = token_windows(NUM_STEPS * NUM_MICRO_BATCHES * BATCH).split(BATCH)
    mine = windows[step * NUM_MICRO_BATCHES : (step + 1) * NUM_MICRO_BATCHES]
    return list(mine) if way == "one" else [ids_BT.chunk(2)[dist.get_rank()] for ids_BT in mine]


@contextlib.contextmanager
def without_sync(model: nn.Module, way: Way) -> Iterator[None]:
    """Let gradients of a micro batch wait for those of the last one, as trainers do."""
    if way == "ddp":
        with model.no_sync():
            yield
        return
    if way != "one":
        model.set_requires_gradient_sync(False)
    yield
    if way != "one":
        model.set_requires_gradient_sync(True)


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Return the mean next-token loss."""
    logits = model(ids_BT)[:, :-1]
    return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids_BT[:, 1:].reshape(-1))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, way: Way) -> None:
    """Take one optimizer step over accumulated micro batches, with clipping that bites."""
    *early, last = micro_batches(step, way)
    for ids_BT in early:
        with without_sync(model, way):
            (loss_of(model, ids_BT) / NUM_MICRO_BATCHES).backward()
    (loss_of(model, last) / NUM_MICRO_BATCHES).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) > 0.1
    optimizer.step()
    optimizer.zero_grad()


class Training:
    """One training; every method is collective unless `way` is one."""

    def __init__(self, source: Mapping[str, Any], way: Way) -> None:
        self.way = way
        self.model = wrap(Stack(), way)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.conductor: Sparsifier = Recipe.load(source).sparsifier()
        self.step = 0

    def attach(self) -> None:
        """Hold masks from now on."""
        self.conductor.attach(self.model, [self.optimizer], total_steps=NUM_STEPS)

    def train(self, last: int = NUM_STEPS) -> None:
        """Train until `last` steps are taken."""
        for step in range(self.step, last):
            train_step(self.model, self.optimizer, step, self.way)
            self.check_parts()
        self.step = last

    def check_parts(self) -> None:
        """Check that pruned weights are zero, and that masks and statistics hold this process's rows alone."""
        observation = self.conductor._observation
        assert observation is not None
        for binding in self.conductor.targets.resolve(self.model):
            rows = distributed.local(binding.parameter.detach())
            mask = self.conductor.masks.get(binding.name)
            if mask is not None:
                assert mask.shape == rows.shape, f"mask of {binding.name}: {mask.shape}, rows here: {rows.shape}"
                assert mask.untyped_storage().nbytes() == rows.numel()
                assert not rows[~mask].any(), f"pruned weights of {binding.name} came back"
            for statistic in observation.statistics[binding.name].values():
                if statistic.source == "step":
                    sizes = [getattr(statistic, name).numel() for name in statistic._defaults]
                    assert sizes == [rows.numel(), 1], f"statistics of {binding.name}: {sizes}"

    def save(self, path: str) -> None:
        """Write everything whole into one file, from the first rank."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=WHOLE)
        saved = {"step": self.step, "model": model, "optimizer": optimizer, "pruning": self.conductor.state_dict()}
        if distributed.is_first_rank():
            torch.save(saved, path)
        if self.way != "one":
            dist.barrier()

    def load(self, path: str) -> None:
        """Take up a saved training; masks come with `attach`."""
        saved = torch.load(path, weights_only=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=WHOLE,
        )
        self.conductor.load_state_dict(saved["pruning"])
        self.step = saved["step"]

    def outcome(self) -> "Outcome":
        """Let go and return what was reached."""
        state = self.conductor.state_dict()
        whole = {name: unpack(state["masks"][name], shape) for name, shape in state["shapes"].items()}
        weights, _ = get_state_dict(self.model, self.optimizer, options=WHOLE)
        self.conductor.detach()
        return Outcome(whole, {name: value.clone() for name, value in weights.items()}, state)


@dataclass(frozen=True)
class Outcome:
    """What a training has reached, whole: keep masks and weights by name, and the conductor's state."""

    masks: dict[str, Tensor]
    weights: dict[str, Any]
    state: dict[str, Any]


def train_through(source: Mapping[str, Any], way: Way) -> Outcome:
    """Train with a recipe from start to end."""
    training = Training(source, way)
    training.attach()
    training.train()
    return training.outcome()
