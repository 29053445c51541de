"""A bare training loop over a tiny model, to compare trainers and interruptions with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.recipe.recipe import Recipe
from tests.tiny_models import tiny_llama, token_windows

NUM_STEPS = 12
BATCH = 4
SCORERS = ("Magnitude", "Wanda", "Taylor", "Gradient", "Movement", "Random")


def recipe(sparsity: float = 0.5, **prune: Any) -> dict[str, Any]:
    """Return a recipe that prunes at steps 2, 4, 6 and 8 of 12."""
    schedule = {"class_path": "Cubic", "init_args": {"sparsity": sparsity, "start": 2, "end": 8, "interval": 2}}
    return {"prune": {"schedule": schedule} | prune}


def sparsifier(source: Mapping[str, Any] | None = None) -> Sparsifier:
    """Return the conductor of a recipe."""
    return Recipe.load(recipe() if source is None else source).sparsifier()


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters; Transformers and torch decay different ones, so none are."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0, **options)


def batches(num_steps: int = NUM_STEPS) -> list[Tensor]:
    """Return one batch of ids_BT per step."""
    return list(token_windows(BATCH * num_steps).split(BATCH))


def train(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    *,
    first: int = 0,
    last: int = NUM_STEPS,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train from step `first` to step `last` on fixed batches, with clipping."""
    model.train()
    for step, ids_BT in enumerate(batches()[first:last], start=first + 1):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step(step)


def train_pruned(
    source: Mapping[str, Any] | None = None, *, wrap: Callable[[PreTrainedModel], nn.Module] = lambda model: model
) -> tuple[PreTrainedModel, Sparsifier]:
    """Train a tiny Llama with a recipe from start to end; `wrap` gives the module that is attached."""
    model = tiny_llama()
    optimizer = adamw(model)
    conductor = sparsifier(source)
    conductor.attach(wrap(model), [optimizer], total_steps=NUM_STEPS)
    train(model, optimizer)
    conductor.detach()
    return model, conductor


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Check that two models hold bit-identical tensors under the same names."""
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing, f"weights differ: {differing}"


def assert_same_masks(first: Sparsifier, second: Sparsifier) -> None:
    """Check that two conductors hold identical masks."""
    assert first.masks.keys() == second.masks.keys()
    assert first.masks, "no masks to compare"
    differing = [name for name in first.masks if not torch.equal(first.masks[name], second.masks[name])]
    assert not differing, f"masks differ: {differing}"
