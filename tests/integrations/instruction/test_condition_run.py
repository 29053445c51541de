"""A condition in both trainers: the same weights as a bare loop, exact resume, one rate for the model and another."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.integrations.hf_trainer import PruningCallback as HFCallback
from lightning_prune.integrations.lightning_trainer import PruningCallback as LightningCallback
from lightning_prune.recipe import Recipe
from lightning_prune.structured.structure import Stack
from tests.integrations.trainings import InOrderTrainer, TinyModule, hf_trainer, lightning_trainer, resumes_in_place
from tests.loops import BATCH, NUM_STEPS, assert_same_weights
from tests.tiny_models import TokenDataset, tiny_llama, token_windows

PROMPT = 5


class PromptDataset(TokenDataset):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids_NT[index]
        labels = ids.clone()
        labels[:PROMPT] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def dataset() -> PromptDataset:
    return PromptDataset(token_windows(BATCH * NUM_STEPS))


def recipe(**options: Any) -> Recipe:
    init_args = {
        "budget": {"keep": 0.5},
        "predictor": {"hidden": 8},
        "start": {"num_sequences": 8, "num_clusters": 2, "num_steps": 5},
        "guard": {"every": 5, "num_sequences": 4},
        "rate": 0.5,
        **options,
    }
    return Recipe.load({"condition": {"class_path": "Instruction", "init_args": init_args}})


def train_bare(given: Recipe) -> torch.nn.Module:
    """Train in a loop of one's own, with two parameter groups."""
    model, method = tiny_llama().train(), given.condition
    assert isinstance(method, Instruction)
    condition = method.insert(model, Stack((), "", (), 2))
    model.to(torch.float32)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if not n.startswith("mask_predictor")]},
        {"params": list(condition.predictor.parameters()), "lr": 0.5e-2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    condition.begin(total_steps=NUM_STEPS)
    batches = list(DataLoader(dataset(), batch_size=BATCH))
    condition.warm_start(batches[:2])
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    return model


def train_hf(given: Recipe, out: Path, **options: Any) -> torch.nn.Module:
    torch.manual_seed(11)
    trainer = hf_trainer(tiny_llama(), out, [HFCallback(given)], **options)
    trainer.train_dataset = dataset()
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer.model


def train_lightning(given: Recipe, **options: Any) -> torch.nn.Module:
    torch.manual_seed(11)
    module = TinyModule()
    trainer = lightning_trainer([LightningCallback(given)], **options)
    trainer.fit(module, DataLoader(dataset(), batch_size=BATCH))
    return module.model


@pytest.fixture
def fixed_head(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the head's first weights be the same wherever it is made."""
    make = Instruction.insert

    def insert(self: Instruction, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return make(self, *args, **kwargs)

    monkeypatch.setattr(Instruction, "insert", insert)
    yield


@pytest.mark.usefixtures("fixed_head")
def test_both_trainers_give_the_weights_of_a_bare_loop(tmp_path: Path) -> None:
    expected = train_bare(recipe())
    assert_same_weights(train_hf(recipe(), tmp_path), expected)
    assert_same_weights(train_lightning(recipe()), expected)


@pytest.mark.usefixtures("fixed_head")
def test_resume_is_exact_under_transformers(tmp_path: Path) -> None:
    expected = train_hf(recipe(), tmp_path / "whole")
    torch.manual_seed(11)
    trainer = hf_trainer(tiny_llama(), tmp_path / "half", [HFCallback(recipe())], save_strategy="steps", save_steps=5)
    trainer.train_dataset = dataset()
    trainer.add_callback(StopAt(5))
    trainer.train()
    again = hf_trainer(tiny_llama(), tmp_path / "half", [HFCallback(recipe())], save_strategy="steps", save_steps=5)
    again.train_dataset = dataset()
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-5"))
    assert_same_weights(again.model, expected)


from transformers import TrainerCallback  # noqa: E402


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
