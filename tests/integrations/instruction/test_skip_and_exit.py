"""Skipped blocks and early exits in both trainers: the weights of a bare loop, and an exact resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune.conditional.early_exit import EarlyExit
from lightning_prune.conditional.method import Condition, ConditionMethod
from lightning_prune.conditional.skip_layer import SkipLayer
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback as HFCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback as LightningCallback
from lightning_prune.recipe.recipe import Recipe
from tests.conditional.inserted import insert
from tests.integrations.instruction.test_condition_run import StopAt
from tests.integrations.trainings import TinyModule, hf_trainer, lightning_trainer, loader, resumes_in_place
from tests.loops import assert_same_weights, batches
from tests.tiny_models import tiny_llama

METHODS = ("skip_layer", "early_exit")
NUM_STEPS = 3


def recipe(name: str) -> Recipe:
    return Recipe.load(f"conditional/{name}")


@pytest.fixture(autouse=True)
def noise_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the noise of a step depend on its number alone: trainers draw other random numbers before."""
    make = SkipLayer.insert

    def insert(self: SkipLayer, model: nn.Module, stack: Any) -> Condition:
        condition = make(self, model, stack)
        router = condition.routers[0]
        condition.call.decoder.register_forward_pre_hook(lambda *_: torch.manual_seed(int(router.num_steps)) and None)
        return condition

    monkeypatch.setattr(SkipLayer, "insert", insert)


def train_bare(method: ConditionMethod) -> nn.Module:
    model = tiny_llama().train()
    condition = insert(method, model)
    added = [p for module in condition.added().values() for p in module.parameters()]
    own = [p for p in model.parameters() if not any(p is other for other in added)]
    groups: list[dict[str, Any]] = [{"params": own}, {"params": added, "lr": 1e-2 * method.rate}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    condition.begin(total_steps=NUM_STEPS)
    for ids in batches()[:NUM_STEPS]:
        (model(input_ids=ids, labels=ids).loss + condition.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    return model


@pytest.mark.parametrize("name", METHODS)
def test_both_trainers_give_the_weights_of_a_bare_loop(name: str, tmp_path: Path) -> None:
    # without clipping: Lightning sums a norm in the order of the optimizer's groups, Transformers in the model's
    method = recipe(name).condition
    assert isinstance(method, SkipLayer | EarlyExit)
    expected = train_bare(method)
    trainer = hf_trainer(tiny_llama(), tmp_path, [HFCallback(recipe(name))], max_steps=NUM_STEPS, max_grad_norm=0)
    trainer.train()
    assert_same_weights(trainer.model, expected)
    module = TinyModule()
    options = {"max_steps": NUM_STEPS, "limit_val_batches": 1, "gradient_clip_val": None}
    lightning_trainer([LightningCallback(recipe(name))], **options).fit(module, loader(), loader())
    assert_same_weights(module.model, expected)
    added = [name for name in expected.state_dict() if "skip_router" in name or "early_exit" in name]
    assert any(bool(expected.state_dict()[name].any()) for name in added if name.endswith("weight"))


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact_under_transformers(name: str, tmp_path: Path) -> None:
    def trainer(folder: str) -> Any:
        options = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 1}
        return hf_trainer(tiny_llama(), tmp_path / folder, [HFCallback(recipe(name))], **options)

    whole = trainer("whole")
    whole.train()
    first = trainer("half")
    first.add_callback(StopAt(1))
    first.train()
    again = trainer("half")
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-1"))
    assert_same_weights(again.model, whole.model)


@resumes_in_place
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact_under_lightning(name: str, tmp_path: Path) -> None:
    def fit(folder: Path, path: Path | None = None) -> nn.Module:
        module = TinyModule()
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        given = [LightningCallback(recipe(name)), saving]
        trainer = lightning_trainer(given, max_steps=NUM_STEPS, limit_val_batches=1, enable_checkpointing=True)
        trainer.fit(module, loader(), loader(), ckpt_path=path)
        return module.model

    expected = fit(tmp_path / "whole")
    assert_same_weights(fit(tmp_path / "again", tmp_path / "whole" / "step=1.ckpt"), expected)
