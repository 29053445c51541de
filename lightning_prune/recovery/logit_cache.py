"""A teacher's top-k logits on disk, found again by the tokens themselves.

A passage (one text of a batch, without padding) is the key, so the cache survives another order, another batch size
and a restart. Every process appends to files of its own and reads everybody's. A file that a kill cut off
keeps what was complete before; its writer starts new files.

Stored are log-probabilities at the temperature of the run, the k likeliest and the one of all other tokens: the latter
cannot be known at another temperature without all logits, so the temperature is part of the header.

Source: top-k targets, arXiv 2407.14679, section 3 and table 12.
Cost: 4 k + 2 bytes per token (6 k + 2 for vocabularies above 65,536), and 32 bytes per passage. float16 was taken
    because on a pruned stories260K with k = 100 it moves the gradient by 3e-4 of its norm, bfloat16 by 3e-3.
Limits: the teacher must see nothing but tokens and positions. Several machines need one shared folder.

Shapes: B sequences, T tokens, N = B * T, V vocabulary, k likeliest tokens, K = k + 1, W int16 words per token.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.recovery.token_loss import TopTargets

__all__ = ["CacheHeader", "LogitCache", "Passages"]

_FORMAT = 1
_ENTRY = struct.Struct("<16sqq")  # key, first token, number of tokens
_LARGEST_UINT16 = 1 << 16
# Inputs that say no more than the positions do.
_SAME_AS_POSITIONS = frozenset({"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"})


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """What a cache is of; another run must agree in all of it.

    Args:
        teacher: tells the teacher from others.
        vocab_size: logits per token.
        top_k: tokens kept.
        temperature: of the stored probabilities.
        format: version of the files.
    """

    teacher: str
    vocab_size: int
    top_k: int
    temperature: float
    format: int = _FORMAT

    @property
    def words(self) -> int:
        """Return the int16 words of one token: probabilities, then ids."""
        return self.top_k + 1 + self.top_k * (1 if self.vocab_size <= _LARGEST_UINT16 else 2)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes on disk of one token, without the 32 bytes of its passage."""
        return 2 * self.words


@dataclass(frozen=True)
class Passages:
    """The texts of a batch: their keys, and where their tokens stand among the N of the batch."""

    keys: tuple[bytes, ...]
    lengths: tuple[int, ...]
    positions_M: Tensor
    num_tokens: int

    @classmethod
    def of(cls, inputs: Mapping[str, object]) -> "Passages":
        """Find the passages in the inputs of a model's call.

        Args:
            inputs: `input_ids` of shape BT, and where given `attention_mask`, which leaves out padding, and
                `position_ids`, which start again from 0 where a new text begins within a row.

        Raises:
            ValueError: if there are other inputs that change what the teacher says.
        """
        _check_inputs(inputs)
        ids_BT = _host(inputs["input_ids"])
        mask, given = inputs.get("attention_mask"), inputs.get("position_ids")
        kept_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask is None else _host(mask).bool()
        starts_BT = torch.zeros_like(kept_BT)
        starts_BT[torch.arange(len(ids_BT)), kept_BT.int().argmax(1)] = True
        if given is not None:
            starts_BT |= _host(given).expand_as(ids_BT) == 0
        positions_M = kept_BT.flatten().nonzero()[:, 0]
        ids_M = ids_BT.flatten()[positions_M].to(torch.int32)
        first = starts_BT.flatten()[positions_M].nonzero()[:, 0].tolist()
        ends = [*first[1:], len(ids_M)][: len(first)]
        content = _bytes(ids_M)
        keys = tuple(
            hashlib.blake2b(content[4 * start : 4 * end], digest_size=16).digest()
            for start, end in zip(first, ends, strict=True)
        )
        lengths = tuple(end - start for start, end in zip(first, ends, strict=True))
        return cls(keys, lengths, positions_M, ids_BT.numel())


class LogitCache:
    """One run's view of a cache: it reads the files of all processes and writes its own.

    Args:
        folder: made if it does not exist.
        header: what this run needs.
        rank: of this process, part of the names of its files.

    Raises:
        ValueError: if the folder holds logits of something else.
    """

    def __init__(self, folder: str | Path, *, header: CacheHeader, rank: int = 0) -> None:
        self.header = header
        self._folder = Path(folder)
        self._rank = rank
        self._folder.mkdir(parents=True, exist_ok=True)
        _agree(self._folder / "header.json", header, rank)
        self._segments: dict[str, _Segment] = {}
        self._places: dict[bytes, tuple[_Segment, int, int]] = {}
        self._writer: _Writer | None = None
        self._refresh()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, passages: Passages, *, device: torch.device) -> TopTargets | None:
        """Return the targets of all N tokens of a batch; None if a text is missing. Those of padding mean nothing."""
        if any(key not in self._places for key in passages.keys):
            self._refresh()
        places = [self._places.get(key) for key in passages.keys]
        words_NW = torch.zeros((passages.num_tokens, self.header.words), dtype=torch.int16)
        wanted: dict[_Segment, list[tuple[int, int]]] = {}
        for place, length in zip(places, passages.lengths, strict=True):
            if place is None:
                return None
            wanted.setdefault(place[0], []).append((place[1], length))
        of_token_M = torch.repeat_interleave(torch.tensor(passages.lengths))
        segment_of = list(wanted)
        if len(segment_of) == 1:
            words_NW[passages.positions_M] = _gather(segment_of[0], wanted[segment_of[0]])
        else:
            for segment in segment_of:
                is_here = torch.tensor([place is not None and place[0] is segment for place in places])
                words_NW[passages.positions_M[is_here[of_token_M]]] = _gather(segment, wanted[segment])
        return self._decode(words_NW.to(device))

    def put(self, passages: Passages, targets: TopTargets) -> None:
        """Append the passages that are not stored yet.

        Args:
            passages: the texts of a batch.
            targets: of all N tokens of the batch.
        """
        words_MW = self._encode(targets)[passages.positions_M]
        if self._writer is None:
            self._writer = _Writer(self._folder, self._rank, self.header.words)
            self._segments[self._writer.segment.name] = self._writer.segment
        split = zip(passages.keys, words_MW.split(passages.lengths), strict=True)
        missing = {key: words_LW for key, words_LW in split if key not in self._places}
        for key, place in self._writer.append(missing).items():
            self._places[key] = (self._writer.segment, *place)

    def _refresh(self) -> None:
        """Read what other processes have added."""
        for path in sorted(self._folder.glob("*.index")):
            if path.stem not in self._segments:
                self._segments[path.stem] = _Segment(path.with_suffix(".data"), self.header.words)
        for segment in self._segments.values():
            if self._writer is None or segment is not self._writer.segment:
                for key, start, length in segment.new_entries():
                    self._places.setdefault(key, (segment, start, length))

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
    """One data file and its index, read through a memory map that grows with the file."""

    def __init__(self, data: Path, words: int) -> None:
        self.name = data.stem
        self._data = data
        self._words = words
        self._num_entries = 0
        self._map_LW: Tensor | None = None

    def new_entries(self) -> list[tuple[bytes, int, int]]:
        """Return (key, first token, tokens) of the complete entries that were not returned before."""
        with self._data.with_suffix(".index").open("rb") as file:
            file.seek(self._num_entries * _ENTRY.size)
            raw = file.read()
        num_tokens = self._data.stat().st_size // (2 * self._words)
        found = []
        for key, start, length in _ENTRY.iter_unpack(raw[: len(raw) // _ENTRY.size * _ENTRY.size]):
            if start + length > num_tokens:
                break
            found.append((key, start, length))
        self._num_entries += len(found)
        return found

    def read(self, index_M: Tensor) -> Tensor:
        """Return words_MW of some tokens of this file."""
        last = int(index_M.max()) + 1
        if self._map_LW is None or len(self._map_LW) < last:
            num_tokens = self._data.stat().st_size // (2 * self._words)
            flat = torch.from_file(str(self._data), shared=False, size=num_tokens * self._words, dtype=torch.int16)
            self._map_LW = flat.view(num_tokens, self._words)
        return self._map_LW.index_select(0, index_M)


class _Writer:
    """Appends to files that no other process writes: the data first, then the entry that makes it known."""

    def __init__(self, folder: Path, rank: int, words: int) -> None:
        self._data = _create(folder, rank)
        self._index = self._data.with_suffix(".index")
        self._index.touch(exist_ok=False)
        self.segment = _Segment(self._data, words)
        self._num_tokens = 0

    def append(self, passages: Mapping[bytes, Tensor]) -> dict[bytes, tuple[int, int]]:
        """Write words_LW of some passages; return the first token and the number of tokens of each."""
        places = {}
        # Unbuffered, and closed each time, so that what was written is in the files whatever happens next.
        with self._data.open("ab", buffering=0) as data, self._index.open("ab", buffering=0) as index:
            for key, words_LW in passages.items():
                places[key] = (self._num_tokens, len(words_LW))
                _write_all(data, _bytes(words_LW))
                _write_all(index, memoryview(_ENTRY.pack(key, *places[key])))
                self._num_tokens += len(words_LW)
        return places


def _write_all(file: FileIO, content: memoryview) -> None:
    """Write past the limit of a single call."""
    while content:
        content = content[file.write(content) :]


def _gather(segment: _Segment, spans: list[tuple[int, int]]) -> Tensor:
    """Return words_MW of several runs of tokens, one after the other."""
    starts, lengths = torch.tensor(spans).unbind(1)
    shift = starts - (lengths.cumsum(0) - lengths)
    index_M = torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()))
    return segment.read(index_M)


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
        part.write_text(json.dumps(wanted), encoding="ascii")
        part.replace(path)
    found = json.loads(path.read_text(encoding="ascii"))
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        said = ", ".join(f"{key} {found.get(key)!r} (this run: {wanted[key]!r})" for key in differing)
        raise ValueError(
            f"the logits in {path.parent} do not fit this run: {said}; choose another distill.cache_dir, or delete it"
        )


def _check_inputs(inputs: Mapping[str, object]) -> None:
    known = {"input_ids", "attention_mask", "position_ids"} | _SAME_AS_POSITIONS
    unknown = sorted(key for key, value in inputs.items() if isinstance(value, Tensor) and key not in known)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim != 2:
        unknown.append(f"attention_mask of {mask.ndim} dimensions")
    if inputs.get("position_ids") is None:
        unknown += sorted(key for key in inputs if key in _SAME_AS_POSITIONS)
    if unknown:
        raise ValueError(
            f"cached logits are found by tokens and positions alone, but the model is also given {', '.join(unknown)}; "
            "set distill.cache_dir: null"
        )


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor in the order of its values."""
    array: Any = tensor.contiguous().numpy()
    return memoryview(array).cast("B")


def _host(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach().cpu()
