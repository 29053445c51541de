"""Make lm-eval tasks from held-out text: recognize the true next line, and compress whole texts.

The tasks are plain task files with their data beside them, so any later evaluation can name the folder as
`include_path`.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lightning_prune.base.whole_file import written_aside
from lightning_prune.integrations.text.text_documents import Document

__all__ = ["NEXT_LINE", "WHOLE_TEXT", "next_line_questions", "write_tasks"]

NEXT_LINE = "next_line"
WHOLE_TEXT = "whole_text"
NUM_CHOICES = 4

_CONTEXT = 240  # characters shown before the question
_LINE = (12, 160)  # characters of a line that can be asked for
_NUM_WORDS = 4  # of a line at least, so that three pairs of neighbours can be exchanged
_EVERY = 4  # one question for so many usable lines


def next_line_questions(documents: Sequence[Document], *, limit: int, seed: int = 0) -> list[dict[str, object]]:
    """Ask which line comes next: the true one, or one of three copies with two neighbouring words exchanged.

    All choices have the same words and the same length, so neither gives the answer away.

    Args:
        documents: held-out texts.
        limit: the most questions to make.
        seed: of the choice of places and of the order of the choices.

    Returns:
        objects with `context`, `choices` and `answer`, the place of the true line.
    """
    rng = random.Random(seed)
    questions = [question for document in documents for question in _ask(document, rng)]
    rng.shuffle(questions)
    return questions[:limit]


def _ask(document: Document, rng: random.Random) -> Iterator[dict[str, object]]:
    lines = document.text.splitlines(keepends=True)
    usable = [number for number, line in enumerate(lines) if _LINE[0] <= len(line.strip()) <= _LINE[1]]
    for number in usable[_EVERY::_EVERY]:
        true = lines[number].rstrip()
        wrong = _exchanged(true)
        if len(wrong) < NUM_CHOICES - 1:
            continue
        choices = [true, *rng.sample(wrong, NUM_CHOICES - 1)]
        rng.shuffle(choices)
        context = "".join(lines[max(0, number - _CONTEXT) : number])[-_CONTEXT:]
        context = context[context.find("\n") + 1 :] or lines[number - 1]
        yield {"context": context, "choices": choices, "answer": choices.index(true)}


def _exchanged(line: str) -> list[str]:
    """Return the lines that differ by one exchange of neighbouring words; none if one space is not all between them."""
    words = line.split()
    indent = line[: len(line) - len(line.lstrip())]
    if len(words) < _NUM_WORDS or indent + " ".join(words) != line:
        return []
    exchanged = []
    for first in range(len(words) - 1):
        order = [*words[:first], words[first + 1], words[first], *words[first + 2 :]]
        exchanged.append(indent + " ".join(order))
    return sorted(set(exchanged) - {line})


def _whole_texts(documents: Sequence[Document], *, max_characters: int) -> Iterator[dict[str, object]]:
    share = max(1, max_characters // len(documents))
    for document in documents:
        yield {"name": document.name, "text": document.text[:share]}


def write_tasks(
    folder: Path, documents: Sequence[Document], *, num_questions: int, max_characters: int, seed: int = 0
) -> int:
    """Write both tasks with their data.

    Args:
        folder: made if it does not exist; the task files name it by its absolute path and replace earlier ones.
        documents: held-out texts.
        num_questions: the most next-line questions to make.
        max_characters: how much text to compress, an equal share from the start of each document.
        seed: of the questions.

    Returns:
        how many questions were made.

    Raises:
        ValueError: if no question can be made from the documents.
    """
    questions = next_line_questions(documents, limit=num_questions, seed=seed)
    if not questions:
        raise ValueError(
            f"no next-line question can be made from {len(documents)} held-out documents; give text with lines of "
            f"{_LINE[0]} to {_LINE[1]} characters and {_NUM_WORDS} words"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_task(folder, NEXT_LINE, questions, _multiple_choice())
    _write_task(folder, WHOLE_TEXT, list(_whole_texts(documents, max_characters=max_characters)), _rolling())
    return len(questions)


def _write_task(folder: Path, name: str, records: Sequence[dict[str, object]], task: dict[str, object]) -> None:
    data = folder.absolute() / f"{name}.jsonl"
    _write(data, "".join(json.dumps(record) + "\n" for record in records))
    source = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    text = yaml.safe_dump(source | {"test_split": "test", "num_fewshot": 0} | task, sort_keys=False)
    _write(folder / f"{name}.yaml", text)


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _multiple_choice() -> dict[str, object]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


def _rolling() -> dict[str, object]:
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    }
