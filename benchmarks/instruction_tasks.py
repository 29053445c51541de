"""Eight kinds of text, each with wordings of an instruction: the data of `quality_instruction.py`.

A sequence is [instruction, the first tokens of the text | the rest of the text]; the labels leave out what stands
before the bar. Train and held-out text do not meet; one wording of each task is kept back for the question what an
unseen wording does.
"""

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor

WORDINGS: Mapping[str, tuple[str, str, str, str]] = {  # the last one is never trained on
    "stories": ("Tell a story for children.", "Write a tale for a child.", "Go on with this story.", "Make up a tale."),
    "wiki": ("Write an encyclopedia article.", "Continue the article.", "Explain the topic.", "Go on with this entry."),
    "shakespeare": ("Write a scene of Shakespeare.", "Continue the play.", "Let them speak.", "Go on with this drama."),
    "python": ("Write Python code.", "Complete the Python function.", "Program in Python.", "Go on with this module."),
    "java": ("Write Java code.", "Complete the Java method.", "Program this in Java.", "Go on with this Java class."),
    "csharp": ("Write C# code.", "Complete the C# method.", "Program this in C#.", "Go on with this C# class."),
    "arithmetic": ("Work out the sums.", "Calculate.", "Give the results.", "Solve these exercises."),
    "induction": ("Answer as in the examples.", "Follow the pattern.", "Find the rule.", "Go on with these pairs."),
}
TASKS = tuple(WORDINGS)
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Sizes of a sequence, in tokens."""

    length: int = 128
    opening: int = 16  # of the text, read with the instruction
    vocab_size: int = 1024


class InstructionTasks:
    """Batches of all tasks; the tasks of a batch and its windows follow from a seed.

    Args:
        folder: the test data.
        shape: of the sequences.
        tokenizer: of a model that is trained already; without it one is trained on the texts.
    """

    def __init__(self, folder: Path, shape: Shape | None = None, tokenizer: Tokenizer | None = None) -> None:
        self.shape = shape or Shape()
        texts = {task: _text(task, folder) for task in TASKS}
        cut = {task: int(0.9 * len(text)) for task, text in texts.items()}
        beginnings = [texts[task][: min(cut[task], 400_000)] for task in TASKS]
        self.tokenizer = tokenizer or _trained(beginnings, self.shape.vocab_size)
        self._train = {task: self._ids(texts[task][: cut[task]]) for task in TASKS}
        self._held_out = {task: self._ids(texts[task][cut[task] :]) for task in TASKS}
        self._wordings = {task: [self._ids(wording).tolist() for wording in WORDINGS[task]] for task in TASKS}

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def train(self, seed: int, step: int, batch_size: int) -> dict[str, Tensor]:
        """Return the batch of a training step, of random tasks."""
        rng = random.Random(f"{seed} {step}")
        rows = [self._row(task, self._train, rng, rng.randrange(3)) for task in rng.choices(TASKS, k=batch_size)]
        return collate(rows)

    def of_task(self, task: str, seed: int, num: int) -> dict[str, Tensor]:
        """Return training sequences of one task."""
        rng = random.Random(f"{task} {seed}")
        return collate([self._row(task, self._train, rng, i % 3) for i in range(num)])

    def held_out(self, task: str, num: int, *, wording: int | None = None) -> dict[str, Tensor]:
        """Return held-out sequences of a task, always the same; with this wording, or those trained on in turn."""
        rng = random.Random(task)
        return collate(
            [self._row(task, self._held_out, rng, i % 3 if wording is None else wording) for i in range(num)]
        )

    def _row(
        self, task: str, source: Mapping[str, Tensor], rng: random.Random, wording: int
    ) -> tuple[list[int], list[int]]:
        instruction = [1, *self._wordings[task][wording]]
        num = self.shape.length - len(instruction)
        stream = source[task]
        begin = rng.randrange(len(stream) - num)
        ids = instruction + stream[begin : begin + num].tolist()
        left_out = len(instruction) + self.shape.opening
        return ids, [IGNORED] * left_out + ids[left_out:]


def _trained(texts: list[str], vocab_size: int) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>"]
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    return tokenizer


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Return rows of one length as a batch."""
    ids = torch.tensor([ids for ids, _ in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([labels for _, labels in rows]),
    }


def _text(task: str, folder: Path) -> str:
    """Return the text of a task, a few hundred thousand characters."""
    readers: Mapping[str, Callable[[], str]] = {
        "stories": lambda: (folder / "text/tinystories_v1_train.txt").read_text(encoding="utf-8"),
        "wiki": lambda: (folder / "text/wikitext2_raw_train_5k.txt").read_text(encoding="utf-8")[:900_000],
        "shakespeare": lambda: (folder / "text/tinyshakespeare.txt").read_text(encoding="utf-8"),
        "python": lambda: _python(),
        "java": lambda: _pairs(folder, "java"),
        "csharp": lambda: _pairs(folder, "cs"),
        "arithmetic": lambda: _sums(20_000),
        "induction": lambda: _induction(folder),
    }
    return readers[task]()


def _python() -> str:
    """Return modules of the standard library, in the order of their names."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:900_000]


def _pairs(folder: Path, language: str) -> str:
    lines = (folder / "code/codexglue_java_cs_2k.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)[language] for line in lines)


def _induction(folder: Path) -> str:
    lines = (folder / "instruct/instruction_induction_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    return "\n".join(f"Input: {row['input']}\nOutput: {row['output']}" for row in rows)


def _sums(num: int) -> str:
    rng = random.Random(0)
    lines = []
    for _ in range(num):
        a, b, sign = rng.randrange(100), rng.randrange(100), rng.choice("+-*")
        lines.append(f"{a} {sign} {b} = {eval(f'{a}{sign}{b}')}")
    return "\n".join(lines)
