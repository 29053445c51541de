"""A conditioned model that learns from the whole one, `recover.distill` beside `condition`, in both trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_prune.conditional.instruction import Instruction
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.structure import Stack
from tests.integrations.instruction.test_condition_run import dataset, fixed_head, recipe, train_hf, train_lightning
from tests.loops import BATCH, NUM_STEPS, assert_same_weights
from tests.tiny_models import tiny_llama

__all__ = ["fixed_head"]  # a fixture
CHUNK = 6


def taught(teacher: str, **reads: Any) -> Recipe:
    given = recipe(start=None, guard=None, ramp=0.0, **({"reads": reads} if reads else {})).as_dict()
    return Recipe.load(given | {"recover": {"distill": {"teacher": teacher}}})


def teacher_folder(folder: Path) -> Path:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder)
    return folder


def train_bare(given: Recipe, teacher: nn.Module) -> nn.Module:
    """Train towards what the teacher says of the tokens with a label, which stand behind what is read."""
    model = tiny_llama().train()
    assert isinstance(given.condition, Instruction)
    condition, chunk = given.condition.insert(model, Stack((), "", (), 2)), given.condition.reads.chunk
    own = [p for name, p in model.named_parameters() if not name.startswith("mask_predictor")]
    groups = [{"params": own}, {"params": list(condition.predictor.parameters()), "lr": 0.5e-2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    condition.begin(total_steps=NUM_STEPS)
    for batch in DataLoader(dataset(), batch_size=BATCH):
        if chunk is not None:
            batch["labels"][:, :chunk] = -100
        logits, (labels, ids) = model(**batch).logits[:, :-1], (batch["labels"][:, 1:], batch["input_ids"])
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[:, :-1][labels != -100].softmax(-1)
        found = logits[labels != -100].log_softmax(-1)
        functional.kl_div(found, wanted, reduction="batchmean").backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    return model


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), atol=2e-4, rtol=0.0)


@pytest.mark.usefixtures("fixed_head")
def test_both_trainers_learn_what_the_teacher_says_behind_the_instruction(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher")
    given = taught(str(folder))
    found = train_hf(given, tmp_path / "out")
    assert_close(found, train_bare(given, LlamaForCausalLM.from_pretrained(folder)))
    assert_same_weights(train_lightning(given), found)


@pytest.mark.usefixtures("fixed_head")
def test_the_teacher_says_nothing_of_a_chunk_that_is_read(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher")
    given = taught(str(folder), source="chunk", chunk=CHUNK)
    assert_close(train_lightning(given), train_bare(given, LlamaForCausalLM.from_pretrained(folder)))


@pytest.mark.usefixtures("fixed_head")
def test_the_teacher_self_is_the_whole_model_before_it_was_conditioned(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "teacher")
    assert_same_weights(train_lightning(taught("self")), train_lightning(taught(str(tmp_path / "teacher"))))


@pytest.mark.parametrize(
    ("recover", "condition", "said"),
    [
        ({"retrain": ["norms"]}, "Instruction", "recover.retrain says what is trained"),
        ({"lora": {}}, "Instruction", "leave lora out"),
        ({"distill": {"teacher": "self"}}, "EarlyExit", "EarlyExit trains on the model's own loss"),
    ],
)
def test_other_recoveries_beside_a_condition_are_refused(recover: Any, condition: str, said: str) -> None:
    options = {"budget": {"keep": 0.5}} if condition == "Instruction" else {}
    with pytest.raises(ValueError, match=said):
        Recipe.load({"condition": {"class_path": condition, "init_args": options}, "recover": recover})
