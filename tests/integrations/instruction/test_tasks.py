from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.cli import command as cli
from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.integrations.instruction.tasks import model_of_tasks, read_task_texts
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback
from lightning_prune.predictors.budget import Budget
from lightning_prune.recipe.recipe import Recipe
from lightning_prune.structured.groups import Cut, zeroed
from tests.model_folders import character_tokenizer, write_model_folder
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


def write_texts(folder: Path) -> Path:
    (folder / "prose").mkdir(parents=True)
    (folder / "prose" / "one.txt").write_text(" ".join(TEXTS["prose"]))
    (folder / "sums.txt").write_text("\n".join(TEXTS["sums"]))
    (folder / ".hidden").write_text("no task")
    return folder


def test_the_recipe_writes_a_folder_that_serves_its_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    texts = write_texts(tmp_path / "texts")
    assert {name: len(found) for name, found in read_task_texts(str(texts)).items()} == {"prose": 1, "sums": 1}
    model = write_model_folder(tmp_path / "model")
    asked = ["oneshot", "--config=instruction/tasks", f"--model={model}", f"--data={texts}", "--device=cpu"]
    out = tmp_path / "out"
    assert cli.main([*asked, f"--out={out}", "--condition.budget.keep=0.5", "--sequence_length=20"]) == 0
    assert "2 tasks (prose, sums), each with 24 of 48 FFN units of a block" in caplog.text
    assert "two tasks share" in caplog.text
    found = InstructionModel.from_pretrained(out, device="cpu")
    ids = torch.tensor([character_tokenizer()("1 + 1")["input_ids"]])
    assert set(found.tasks) == {"prose", "sums"}
    assert not torch.equal(found.select(task="sums")(ids).logits, found.select(task="prose")(ids).logits)
    assert found.select(task="sums").config.intermediate_size == 24
    assert cli.main([*asked[:2], f"--model={out}", f"--data={texts}", f"--out={tmp_path / 'again'}"]) == 2
    assert "has a predictor already" in capsys.readouterr().err


def test_two_tasks_of_one_name_and_missing_texts_are_refused(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    (texts / "sums.md").write_text("1 + 1")
    with pytest.raises(ValueError, match=r"two tasks in .* are named sums"):
        read_task_texts(str(texts))
    for data in (None, str(tmp_path / "none"), str(texts / "sums.txt")):
        with pytest.raises(ValueError, match="--data must be a folder with a file or a folder"):
            read_task_texts(data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        read_task_texts(str(tmp_path / "empty"))


def test_no_training_takes_it_and_nothing_of_one_goes_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="TaskUnits is made from texts without a training"):
        PruningCallback("instruction/tasks")
    for override, said in (
        ("evaluate.tasks=[arc_easy]", "evaluate belongs to one; set evaluate: null"),
        ("recover.retrain=[biases]", "recover belongs to one"),
        ("report.dir=somewhere", "report.dir has no effect with TaskUnits"),
    ):
        with pytest.raises(ValueError, match=said):
            Recipe.load("instruction/tasks", overrides=[override])
    asked = ["oneshot", f"--model={tmp_path}", f"--out={tmp_path / 'out'}", "--export=null"]
    assert cli.main([*asked, "--config=instruction/sft"]) == 2
    assert "trains what it adds to the model" in capsys.readouterr().err
