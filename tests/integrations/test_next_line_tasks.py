"""Questions made from text: the right line is right, the wrong ones are fair, and lm-eval can read them."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_prune.integrations.next_line_tasks import next_line_questions, write_tasks
from lightning_prune.integrations.text_documents import Document

LINES = [f"    value_{number} = compute(value_{number - 1}, {'x' * (number % 7)})\n" for number in range(100, 420)]
DOCUMENTS = [Document("one.py", "".join(LINES[:160])), Document("two.py", "".join(LINES[160:]))]


def test_the_answer_is_the_next_line_of_the_document() -> None:
    questions = next_line_questions(DOCUMENTS, limit=1000)
    assert len(questions) >= 10
    for question in questions:
        context, choices, answer = question["context"], question["choices"], question["answer"]
        texts = [document.text for document in DOCUMENTS if f"{context}{choices[answer]}\n" in document.text]
        assert len(texts) == 1
        for place, choice in enumerate(choices):
            assert (f"{context}{choice}\n" in texts[0]) == (place == answer)
            assert f"{choice}\n" in texts[0]
            assert place == answer or choice not in context
        assert len(set(choices)) == 4


def test_the_wrong_lines_are_as_long_as_the_right_one() -> None:
    for question in next_line_questions(DOCUMENTS, limit=1000):
        lengths = [len(choice) for choice in question["choices"]]
        assert max(lengths) - min(lengths) <= 1


def test_right_answers_stand_in_every_place() -> None:
    places = [question["answer"] for question in next_line_questions(DOCUMENTS, limit=1000)]
    assert set(places) == {0, 1, 2, 3}


def test_questions_depend_on_the_seed_alone() -> None:
    first = next_line_questions(DOCUMENTS, limit=5, seed=1)
    assert len(first) == 5
    assert next_line_questions(DOCUMENTS, limit=5, seed=1) == first
    assert next_line_questions(DOCUMENTS, limit=5, seed=2) != first


def test_tasks_are_written_with_their_data(tmp_path: Path) -> None:
    number = write_tasks(tmp_path / "tasks", DOCUMENTS, num_questions=7, max_characters=100)
    assert number == 7
    for name, length in (("next_line", 7), ("whole_text", 2)):
        task = yaml.safe_load((tmp_path / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert data == tmp_path / "tasks" / f"{name}.jsonl"
        assert len(data.read_text().splitlines()) == length
    texts = [json.loads(line)["text"] for line in (tmp_path / "tasks" / "whole_text.jsonl").read_text().splitlines()]
    assert texts == [document.text[:50] for document in DOCUMENTS]


def test_text_without_lines_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no next-line question can be made from 1 held-out documents"):
        write_tasks(tmp_path / "tasks", [Document("one", "word " * 1000)], num_questions=7, max_characters=100)
    assert not (tmp_path / "tasks").exists()
