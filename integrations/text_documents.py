"""Documents to train on, from files or from Python's own sources, and a tokenizer learned from them."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["Document", "read_documents", "train_tokenizer"]

# Folders of the standard library that hold no typical code: tests, installed packages, tables written by programs.
_NOT_TYPICAL = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_PIECE = 8000  # characters: a long text is read as documents of about this size, so that some can be held out
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    name: str
    text: str


def read_documents(path: str | None = None, *, max_characters: int | None = None) -> list[Document]:
    """Read documents; the order of the files depends on their names alone.

    Args:
        path: a .txt, .md, .py or .jsonl file (field `text`) or a folder of such files; None reads the sources of
            Python's standard library.
        max_characters: stop after the document that reaches this many characters.

    Raises:
        ValueError: if there is no text at `path`.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if path is None else path).expanduser()
    files = _standard_library(root) if path is None else _files(root)
    files.sort(key=lambda file: hashlib.sha256(_name(file, root).encode()).digest())
    total, documents = 0, []
    for document in (document for file in files for document in _read(file, root) if document.text.strip()):
        if max_characters is not None and total >= max_characters:
            break
        documents.append(document)
        total += len(document.text)
    if not documents:
        raise ValueError(f"no text found at {root}; give a file or a folder with {', '.join(_SUFFIXES)} files")
    return documents


def _standard_library(root: Path) -> list[Path]:
    files = (path.relative_to(root) for path in root.rglob("*.py") if not path.name.startswith("_sysconfigdata"))
    return [root / path for path in files if not _NOT_TYPICAL.intersection(path.parts)]


def _files(root: Path) -> list[Path]:
    if root.is_file():
        if root.suffix not in _SUFFIXES:
            raise ValueError(f"cannot read text from {root}; allowed are {', '.join(_SUFFIXES)} and folders of these")
        return [root]
    return [path for path in root.rglob("*") if path.suffix in _SUFFIXES and path.is_file()]


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def _read(file: Path, root: Path) -> Iterator[Document]:
    name = _name(file, root)
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".py":
        yield Document(name, text)
        return
    pieces = _records(text, file) if file.suffix == ".jsonl" else _pieces(text)
    for number, piece in enumerate(pieces):
        yield Document(f"{name}:{number}", piece)


def _records(text: str, file: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"{file}, line {number}: expected an object with a field 'text', got {line[:60]!r}")
            yield record["text"]


def _pieces(text: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; any text survives encoding and decoding.

    Args:
        texts: what to learn the merges from.
        vocab_size: number of tokens, the three special ones included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(_SPECIAL):
        raise ValueError(
            f"vocab_size must hold {len(alphabet)} bytes and {len(_SPECIAL)} special tokens, got {vocab_size}"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIAL)
