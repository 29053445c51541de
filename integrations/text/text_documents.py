"""Documents to read, from files, data sets or Python's own sources, and a tokenizer learned from them."""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_prune.base.names import brief, shorten

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
_DATASET = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]*)?(?::[\w.\[\]%-]+)?")  # NAME[:CONFIG[:SPLIT]]
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Document:
    """One text and where it comes from; a chat has its messages (`role`, `content`) too."""

    name: str
    text: str
    messages: tuple[Mapping[str, str], ...] = ()


def read_documents(path: str | None = None, *, max_characters: int | None = None) -> list[Document]:
    """Read documents; the order of the files depends on their names alone.

    Args:
        path: a .txt, .md, .py or .jsonl file (field `text`, or a chat in `messages`) or a folder of such files; a data
            set, `NAME[:CONFIG[:SPLIT]]`, read from its beginning; None reads the sources of Python's standard library.
        max_characters: stop after the document that reaches this many characters.

    Raises:
        ValueError: if there is no text at `path`, or it cannot be read.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if path is None else path).expanduser()
    try:
        if path is not None and not root.exists():
            found = _dataset(path)
        else:
            files = _standard_library(root) if path is None else _files(root)
            files.sort(key=lambda file: hashlib.sha256(_name(file, root).encode()).digest())
            found = (document for file in files for document in _read(file, root))
        total, documents = 0, []
        for document in (document for document in found if document.text.strip()):
            if max_characters is not None and total >= max_characters:
                break
            documents.append(document)
            total += len(document.text)
    except OSError as error:
        raise ValueError(f"the text at {shorten(str(root), 160)} cannot be read: {error.strerror or error}") from error
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
    if file.suffix == ".jsonl":
        yield from _records(text, file)
        return
    for number, piece in enumerate(_pieces(text)):
        yield Document(f"{name}:{number}", piece)


def _records(text: str, file: Path) -> Iterator[Document]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                record = line
            yield _record(record, f"{file}, line {number}")


def _record(record: Any, place: str) -> Document:
    """Return the text, or the chat, that a record holds."""
    if isinstance(record, Mapping) and isinstance(record.get("text"), str):
        return Document(place, record["text"])
    messages = record.get("messages") if isinstance(record, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        keys = f"an object with {', '.join(map(str, record))}" if isinstance(record, Mapping) else brief(record)
        raise ValueError(
            f"{place}: expected an object with a field 'text', or with 'messages' of role and content, got "
            f"{shorten(keys, 160)}"
        )
    chat = tuple(_message(message, place) for message in messages)
    return Document(place, "\n\n".join(message["content"] for message in chat), chat)


def _message(message: Any, place: str) -> Mapping[str, str]:
    """Return role and text of a message; of content in parts, the text."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place}: a message needs a role and a content, both text, got {brief(message)}")
    return {"role": message["role"], "content": content}


def _dataset(source: str) -> Iterable[Document]:
    """Read a data set of the hub, one record after the other as they are asked for.

    Raises:
        ValueError: if it is none, or cannot be opened.
    """
    is_path = source.startswith((".", "/", "~")) or Path(source).suffix in _SUFFIXES
    if is_path or not _DATASET.fullmatch(source):
        raise ValueError(f"no text found at {shorten(source, 160)}; there is no such file or folder")
    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"there is no file or folder {source}; to read a data set of this name: pip install datasets"
        ) from error
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, record in enumerate(records):
            yield _record(record, f"data set {source}, record {number}")
    except ValueError as error:
        raise ValueError(shorten(str(error), 300)) from error
    except Exception as error:  # of the network, the hub, the formats of the files
        raise ValueError(
            f"there is no file or folder {source}, and the data set of this name cannot be read "
            f"({type(error).__name__}: {shorten(str(error), 160)})"
        ) from error


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
