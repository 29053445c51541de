"""Questions made from text: the right line is right, the wrong ones are fair, and lm-eval can read them."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_prune.integrations.text.next_line_tasks import next_line_questions, write_tasks
from lightning_prune.integrations.text.text_documents import Document

LINES = [
    f"    value_{number} = compute(value_{number - 1}, {'x' * (number % 7)}) + {number}\n" for number in range(100, 420)
]
DOCUMENTS = [Document("one.py", "".join(LINES[:160])), Document("two.py", "".join(LINES[160:]))]


def test_the_answer_is_the_next_line_of_the_document() -> None:
    questions = next_line_questions(DOCUMENTS, limit=1000)
    assert len(questions) == 160 // 4 - 1 + 160 // 4 - 1
    for question in questions:
        context, choices, answer = question["context"], question["choices"], question["answer"]
        places = [f"{context}{choice}\n" in document.text for choice in choices for document in DOCUMENTS]
        assert sum(places) == 1
        assert any(places[2 * answer : 2 * answer + 2])
        assert len(context) <= 240
        assert context.startswith("    value_")


def test_the_wrong_lines_differ_by_one_exchange() -> None:
    for question in next_line_questions(DOCUMENTS, limit=1000):
        true = question["choices"][question["answer"]].split()
        assert len(set(question["choices"])) == 4
        for choice in question["choices"]:
            assert choice.startswith("    ")
            words = choice.split()
            differing = [place for place in range(len(true)) if words[place] != true[place]]
            if words != true:
                first, second = differing
                assert second == first + 1
                assert (words[first], words[second]) == (true[second], true[first])


def test_lines_that_give_no_three_exchanges_are_left_out() -> None:
    text = "".join(
        f"three words {number}\n" + "same same same same\n" + "two  spaces in a row\n" for number in range(50)
    )
    assert next_line_questions([Document("one", text)], limit=1000) == []


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
