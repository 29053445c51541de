from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.integrations.instruction.tasks import model_of_tasks
from lightning_prune.predictors.budget import Budget
from lightning_prune.structured.groups import Cut, zeroed
from tests.model_folders import character_tokenizer
from tests.tiny_models import tiny_llama

TEXTS = {"sums": ["1 + 1 = 2", "12 + 3 = 15"], "prose": ["the quick brown fox", "jumps over", "the lazy dog. " * 9]}


def served(**options: Any) -> InstructionModel:
    options = {"budget": Budget(keep=0.75, keep_from=0.25), **options}
    return model_of_tasks(tiny_llama().eval(), character_tokenizer(), TEXTS, batch_size=2, max_tokens=20, **options)


def test_each_task_is_served_by_the_units_that_matter_most_to_it(tmp_path: Path) -> None:
    model = served()
    ids = torch.tensor([character_tokenizer()("1 + 1")["input_ids"]])
    groups = {group.key: group for group in model.sub_models.groups}
    chosen = {}
    for task in TEXTS:
        small = model.select(task=task, keep=0.35)
        assert small.config.intermediate_size == 16
        top = [scores.topk(16).indices.sort().values for scores in model.tasks[task]]
        cuts = [Cut(key, tuple(kept.tolist())) for key, kept in zip(groups, top, strict=True)]
        with model.condition.whole(), zeroed(model.model, groups, cuts):
            expected = model.model(ids).logits
        torch.testing.assert_close(small(ids).logits, expected, rtol=0, atol=1e-5)
        chosen[task] = cuts
    assert chosen["sums"] != chosen["prose"]
    again = InstructionModel.from_pretrained(model.save_pretrained(tmp_path / "model"), device="cpu")
    torch.testing.assert_close(again.select(task="prose", keep=0.35)(ids).logits, small(ids).logits)
    with pytest.raises(ValueError, match=r"was not trained.*its tasks are"):
        again.select("1 + 1")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "there is no task"),
        ({"sums": []}, "the task 'sums' needs"),
        ({"sums": [" "]}, "the task 'sums' needs"),
        ({"sums": "1 + 1"}, "the task 'sums' needs"),
        ({"": ["1 + 1"]}, "the task '' needs"),
    ],
)
def test_tasks_that_say_nothing_are_refused(texts: Any, said: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=said):
        model_of_tasks(model, character_tokenizer(), texts, budget=Budget(keep=0.5))
    assert not hasattr(model, "mask_predictor")
