"""A teacher's top-k logits on disk, found again by what the teacher saw.

A passage (see `passages`) is the key, together with the cache's header, so the cache survives another order, another
batch size and a restart. Every process appends to files of its own and reads everybody's. A file that a kill
cut off keeps what was complete before; its writer starts new files. Every passage and every entry carries a checksum:
what does not agree with it is said, counts as missing, and is stored anew.

Stored are log-probabilities at the temperature of the run, the k likeliest and the one of all other tokens: the latter
cannot be known at another temperature without all logits, so the temperature is part of the header.

Source: top-k targets, arXiv 2407.14679, section 3 and table 12.
Cost: 4 k + 2 bytes per token (6 k + 2 for vocabularies above 65,536), and 48 bytes per passage. float16 was taken
    because on a pruned stories260K with k = 100 it moves the gradient by 3e-4 of its norm, bfloat16 by 3e-3.
Limits: the teacher must see nothing but values per token. Several machines need one shared folder.

Shapes: B sequences, T tokens, N = B * T, V vocabulary, k likeliest tokens, K = k + 1, W int16 words per token, L tokens
    of one passage.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.base.whole_file import written_aside
from lightning_prune.recovery.passages import Passages, memory_of
from lightning_prune.recovery.token_loss import TopTargets

__all__ = ["CacheHeader", "LogitCache", "Passages"]

logger = logging.getLogger(__name__)

_FORMAT = 2
_PLACE = struct.Struct("<16sqq8s")  # key, first token, number of tokens, checksum of their words
_ENTRY_SIZE = _PLACE.size + 8  # with its own checksum
_LARGEST_UINT16 = 1 << 16


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """What a cache is of; another run must agree in all of it.

    Args:
        teacher: tells the teacher from others.
        vocab_size: logits per token.
        top_k: tokens kept.
        temperature: of the stored probabilities.
        dtype: of the teacher's weights; `stored` where they are as its files hold them.
        format: version of the files.
    """

    teacher: str
    vocab_size: int
    top_k: int
    temperature: float
    dtype: str = "stored"
    format: int = _FORMAT

    @property
    def words(self) -> int:
        """Return the int16 words of one token: probabilities, then ids."""
        return self.top_k + 1 + self.top_k * (1 if self.vocab_size <= _LARGEST_UINT16 else 2)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes on disk of one token, without the 48 bytes of its passage."""
        return 2 * self.words

    @property
    def digest(self) -> bytes:
        """Return a part of every key, so that no entry made under another header is ever found."""
        return _checksum(json.dumps(asdict(self), sort_keys=True).encode())


@dataclass(frozen=True)
class _Place:
    """Where a passage is stored."""

    segment: "_Segment"
    start: int
    length: int
    checksum: bytes


class LogitCache:
    """One run's view of a cache: it reads the files of all processes and writes its own.

    Args:
        folder: made if it does not exist.
        header: what this run needs.
        rank: of this process, part of the names of its files.

    Raises:
        ValueError: if the folder holds logits of something else, or its header cannot be read.
    """

    def __init__(self, folder: str | Path, *, header: CacheHeader, rank: int = 0) -> None:
        self.header = header
        self._digest = header.digest
        self._folder = Path(folder)
        self._rank = rank
        self._folder.mkdir(parents=True, exist_ok=True)
        _agree(self._folder / "header.json", header, rank)
        self._segments: dict[str, _Segment] = {}
        self._places: dict[bytes, _Place] = {}
        self._writer: _Writer | None = None
        self._is_closed = False
        self._num_damaged = 0
        self._refresh()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, passages: Passages, *, device: torch.device) -> TopTargets | None:
        """Return the targets of all N tokens of a batch, without meaning for padding.

        None if a text is missing or damaged; a damaged one is missing from then on.
        """
        keys = self._keys(passages)
        if any(key not in self._places for key in keys):
            self._refresh()
        places = [self._places.get(key) for key in keys]
        if any(place is None or place.length != length for place, length in zip(places, passages.lengths, strict=True)):
            return None
        found = [self._read(key, place) for key, place in zip(keys, places, strict=True) if place is not None]
        words = [words_LW for words_LW in found if words_LW is not None]
        if len(words) < len(keys):
            return None
        words_NW = torch.zeros((passages.num_tokens, self.header.words), dtype=torch.int16)
        if words:
            words_NW[passages.positions_M] = torch.cat(words)
        return self._decode(words_NW.to(device))

    def put(self, passages: Passages, targets: TopTargets) -> None:
        """Append the passages that are not stored yet; a disk that takes no more is said once, and then left alone.

        Args:
            passages: the texts of a batch.
            targets: of all N tokens of the batch.
        """
        if self._is_closed:
            return
        words_MW = self._encode(targets)[passages.positions_M]
        split = zip(self._keys(passages), words_MW.split(passages.lengths), strict=True)
        missing = {key: words_LW for key, words_LW in split if key not in self._places}
        try:
            if self._writer is None:
                self._writer = _Writer(self._folder, self._rank, self.header.words)
                self._segments[self._writer.segment.name] = self._writer.segment
            self._places.update(self._writer.append(missing))
        except OSError as error:
            # What was written in part has no entry, so nobody will read it.
            self._is_closed = True
            logger.warning(
                "the logits of the teacher can no longer be stored in %s (%s); the training goes on, and asks the "
                "teacher for every text that is not stored yet",
                self._folder,
                error,
            )

    def _keys(self, passages: Passages) -> list[bytes]:
        return [hashlib.blake2b(key, key=self._digest, digest_size=16).digest() for key in passages.keys]

    def _read(self, key: bytes, place: _Place) -> Tensor | None:
        """Return words_LW of a passage; None, and forget it, if the disk gives something else than was written."""
        content = place.segment.read(place)
        if content is None or _checksum(content) != place.checksum:
            del self._places[key]
            self._say_damaged(1, place.segment)
            return None
        return torch.frombuffer(content, dtype=torch.int16).view(place.length, self.header.words)

    def _say_damaged(self, number: int, segment: "_Segment") -> None:
        if number and not self._num_damaged:
            logger.warning(
                "the cache %s is damaged: %s does not hold what was written; such texts are asked of the teacher again",
                self._folder,
                segment.name,
            )
        self._num_damaged += number

    def _refresh(self) -> None:
        """Read what other processes have added."""
        for path in sorted(self._folder.glob("*.index")):
            if path.stem not in self._segments:
                self._segments[path.stem] = _Segment(path.with_suffix(".data"), self.header.words)
        for segment in self._segments.values():
            if self._writer is None or segment is not self._writer.segment:
                self._places.update(segment.new_entries())
                self._say_damaged(segment.take_damaged(), segment)

    def _encode(self, targets: TopTargets) -> Tensor:
        log_probs_NK = targets.log_probs_NK.to("cpu", torch.float16).contiguous().view(torch.int16)
        ids_Nk = targets.ids_Nk.to("cpu", torch.int32)
        if self.header.vocab_size <= _LARGEST_UINT16:
            return torch.cat([log_probs_NK, ids_Nk.to(torch.uint16).view(torch.int16)], dim=1)
        return torch.cat([log_probs_NK, ids_Nk.contiguous().view(torch.int16)], dim=1)

    def _decode(self, words_NW: Tensor) -> TopTargets:
        num_probs = self.header.top_k + 1
        log_probs_NK = words_NW[:, :num_probs].contiguous().view(torch.float16)
        ids_NI = words_NW[:, num_probs:].clone(memory_format=torch.contiguous_format)  # from a whole storage address
        if self.header.vocab_size <= _LARGEST_UINT16:
            return TopTargets(log_probs_NK, ids_NI.to(torch.int64).bitwise_and_(_LARGEST_UINT16 - 1))
        return TopTargets(log_probs_NK, ids_NI.view(torch.int32).to(torch.int64))


class _Segment:
    """One data file and its index."""

    def __init__(self, data: Path, words: int) -> None:
        self.name = data.stem
        self._data = data
        self._token_size = 2 * words
        self._num_entries = 0
        self._num_damaged = 0

    def new_entries(self) -> dict[bytes, _Place]:
        """Return the complete entries that were not returned before; those that are damaged are counted."""
        with self._data.with_suffix(".index").open("rb") as file:
            file.seek(self._num_entries * _ENTRY_SIZE)
            raw = file.read()
        num_tokens = self._data.stat().st_size // self._token_size if self._data.exists() else 0
        found = {}
        for content, checksum in _entries(raw):
            if _checksum(content) == checksum:
                key, start, length, of_words = _PLACE.unpack(content)
                if start + length > num_tokens:
                    break
                found[key] = _Place(self, start, length, of_words)
            else:
                self._num_damaged += 1
            self._num_entries += 1
        return found

    def take_damaged(self) -> int:
        """Return how many entries were damaged since the last time."""
        number, self._num_damaged = self._num_damaged, 0
        return number

    def read(self, place: _Place) -> bytearray | None:
        """Return the memory of words_LW; None if the file ends before."""
        content = bytearray(place.length * self._token_size)
        try:
            with self._data.open("rb") as file:
                file.seek(place.start * self._token_size)
                return content if file.readinto(content) == len(content) else None
        except OSError:  # a bad sector, or a file that somebody has removed
            return None


def _entries(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield each whole entry of an index and its checksum."""
    for start in range(0, len(raw) - _ENTRY_SIZE + 1, _ENTRY_SIZE):
        entry = raw[start : start + _ENTRY_SIZE]
        yield entry[: _PLACE.size], entry[_PLACE.size :]


def _checksum(content: bytes | bytearray | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


class _Writer:
    """Appends to files that no other process writes: the data first, then the entry that makes it known."""

    def __init__(self, folder: Path, rank: int, words: int) -> None:
        self._data = _create(folder, rank)
        self._index = self._data.with_suffix(".index")
        self._index.touch(exist_ok=False)
        self.segment = _Segment(self._data, words)
        self._num_tokens = 0

    def append(self, passages: Mapping[bytes, Tensor]) -> dict[bytes, _Place]:
        """Write words_LW of some passages; return the place of each."""
        places = {}
        # Unbuffered, and closed each time, so that what was written is in the files whatever happens next.
        with self._data.open("ab", buffering=0) as data, self._index.open("ab", buffering=0) as index:
            for key, words_LW in passages.items():
                content = memory_of(words_LW)
                place = _Place(self.segment, self._num_tokens, len(words_LW), _checksum(content))
                entry = _PLACE.pack(key, place.start, place.length, place.checksum)
                _write_all(data, content)
                _write_all(index, memoryview(entry + _checksum(entry)))
                places[key] = place
                self._num_tokens += len(words_LW)
        return places


def _write_all(file: FileIO, content: memoryview) -> None:
    """Write past the limit of a single call."""
    while content:
        content = content[file.write(content) :]


def _create(folder: Path, rank: int) -> Path:
    """Make the first data file of this rank that does not exist yet."""
    number = 0
    while True:
        path = folder / f"rank{rank:05d}_{number:05d}.data"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


def _agree(path: Path, header: CacheHeader, rank: int) -> None:
    """Write the header of a new cache, or compare the one that is there."""
    wanted = asdict(header)
    if not path.exists():
        part = path.with_name(f"header.{rank}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(wanted), encoding="ascii")
            os.link(part, path)  # of several runs that begin at once, the first wins and the others compare
        except FileExistsError:
            pass
        except OSError:  # a file system without links; a full one says so again
            with written_aside(path) as aside:
                aside.write_text(json.dumps(wanted), encoding="ascii")
        finally:
            part.unlink(missing_ok=True)
    try:
        found = json.loads(path.read_text(encoding="ascii"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged, so nobody knows whose logits these are; delete the folder {path.parent}")
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        said = ", ".join(f"{key} {found.get(key)!r} (this run: {wanted[key]!r})" for key in differing)
        raise ValueError(
            f"the logits in {path.parent} do not fit this run: {said}; choose another distill.cache_dir, or delete it"
        )
