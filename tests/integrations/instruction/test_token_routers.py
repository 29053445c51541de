"""Routers over tokens in both trainers: the weights of a bare loop, and an exact resume.

Gradients are not clipped: trainers add up their norm in different orders, and what was added lies between the others.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_prune.conditional.token_router import RoutedTokens
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as HFCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from lightning_prune.recipe.recipe import Recipe
from tests.conditional.routed_models import stack_of
from tests.integrations.instruction.test_condition_run import StopAt
from tests.integrations.trainings import TinyModule, hf_trainer, lightning_trainer
from tests.loops import BATCH, NUM_STEPS, assert_same_weights
from tests.tiny_models import TokenDataset, tiny_llama, token_windows

OPTIONS = {
    "conditional_adapter": ["condition.init_args.adapter_width=4"],
    "heavy_light": ["condition.init_args.share=0.4"],
    "expert_choice": ["condition.init_args.num_experts=3"],
}
EVERY = pytest.mark.parametrize(
    "name",
    [
        "conditional_adapter",
        pytest.param("heavy_light", marks=pytest.mark.slow),
        pytest.param("expert_choice", marks=pytest.mark.slow),
    ],
)


def recipe(name: str) -> Recipe:
    return Recipe.load(f"conditional/{name}", overrides=[*OPTIONS[name], "condition.init_args.rate=0.5"])


def dataset() -> TokenDataset:
    return TokenDataset(token_windows(BATCH * NUM_STEPS))


def train_bare(given: Recipe) -> tuple[torch.nn.Module, RoutedTokens]:
    model = tiny_llama().train()
    assert given.condition is not None
    condition = given.condition.insert(model, stack_of(model))
    assert isinstance(condition, RoutedTokens)
    condition.begin(total_steps=NUM_STEPS)
    added = {id(p): p for module in condition.added().values() for p in module.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in added and p.requires_grad]},
        {"params": list(added.values()), "lr": 0.5e-2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    for batch in DataLoader(dataset(), batch_size=BATCH):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    return model, condition


def trained_hf(given: Recipe, out: Path, *, stop: int | None = None, resume: str | None = None) -> torch.nn.Module:
    torch.manual_seed(11)
    trainer = hf_trainer(tiny_llama(), out, [HFCallback(given)], save_strategy="steps", save_steps=5, max_grad_norm=0)
    trainer.train_dataset = dataset()
    if stop is not None:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def trained_lightning(given: Recipe) -> torch.nn.Module:
    torch.manual_seed(11)
    module, data = TinyModule(), DataLoader(dataset(), batch_size=BATCH)
    trainer = lightning_trainer([LightningCallback(given)], limit_val_batches=1, gradient_clip_val=None)
    trainer.fit(module, data, data)
    return module.model


@EVERY
def test_both_trainers_give_the_weights_of_a_bare_loop(name: str, tmp_path: Path) -> None:
    expected, condition = train_bare(recipe(name))
    assert condition.metrics()["share"] < 0.7
    assert_same_weights(trained_hf(recipe(name), tmp_path), expected)
    assert_same_weights(trained_lightning(recipe(name)), expected)


@EVERY
def test_a_resume_is_exact(name: str, tmp_path: Path) -> None:
    expected = trained_hf(recipe(name), tmp_path / "whole")
    trained_hf(recipe(name), tmp_path / "half", stop=5)
    again = trained_hf(recipe(name), tmp_path / "half", resume=str(tmp_path / "half" / "checkpoint-5"))
    assert_same_weights(again, expected)
