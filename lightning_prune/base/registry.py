"""Find what a room offers, and suggest the nearest name for one it does not.

A room is a folder or a file of this package whose classes keep one contract. There is no table to edit: a class is
found by reading the names in the files, and only the file that holds it is imported.
"""

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lightning_prune.base.names import nearest, same_name, unknown

if TYPE_CHECKING:
    from lightning_prune.base.statistic import Statistic

__all__ = [
    "Entry",
    "contract",
    "entries",
    "example",
    "get",
    "is_packaged",
    "nearest",
    "room_of",
    "rooms",
    "statistic",
    "unknown",
]


@dataclass(frozen=True)
class _Contract:
    """Where the contract of a room stands, and a class of the room to name as an example."""

    module: str
    name: str
    example: str

    def load(self) -> type:
        """Import the contract."""
        cls: type = getattr(importlib.import_module(f"lightning_prune.{self.module}"), self.name)
        return cls


# What a recipe chooses from, by room.
_CONTRACTS: Mapping[str, _Contract] = {
    "scorers": _Contract("base.types", "Scorer", "Magnitude"),
    "allocations": _Contract("base.types", "Allocation", "Uniform"),
    "granularity": _Contract("base.types", "Granularity", "Unstructured"),
    "schedules": _Contract("base.types", "Schedule", "Cubic"),
    "structured": _Contract("structured.method", "StructuredMethod", "Width"),
    "conditional": _Contract("conditional.method", "ConditionMethod", "Instruction"),
    "predictors.encoder": _Contract("predictors.encoder", "Encoder", "OwnLayers"),
    "structured.depth.criteria": _Contract("structured.depth.criteria", "Criterion", "SequencePerplexity"),
    "structured.depth.fusing": _Contract("structured.depth.fusing", "HiddenLoss", "HiddenSquaredError"),
    "solvers.greedy_output": _Contract("solvers.greedy_output", "OutputChooser", "GreedyOutput"),
    "recovery.divergences": _Contract("recovery.divergences", "Divergence", "ForwardKL"),
    "recovery.matching": _Contract("recovery.matching", "StateDistance", "Cosine"),
}
_STATISTICS = _Contract("base.statistic", "Statistic", "InputNorm")  # torchmetrics takes seconds to import


@dataclass(frozen=True)
class _File:
    """A file of a room: its name, empty where the room is one file, its module, and the names of its classes."""

    name: str
    module: str
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One class of a room, as `lightning-prune methods` shows it.

    `name` is the file name where a file of a folder holds one method, else the class name in lower case.
    """

    room: str
    name: str
    cls: type
    summary: str
    source: str


def rooms() -> dict[str, type]:
    """Return every room that a recipe chooses from, with the contract of its classes."""
    return {room: place.load() for room, place in _CONTRACTS.items()}


def room_of(kind: object) -> str | None:
    """Return the room whose contract a type is, or None."""
    module, name = getattr(kind, "__module__", None), getattr(kind, "__qualname__", None)
    found = (room for room, at in _CONTRACTS.items() if (module, name) == (f"lightning_prune.{at.module}", at.name))
    return next(found, None)


def is_packaged(room: str, cls: type) -> bool:
    """Return whether a class of a room is one of the library's own, which a recipe names without its module."""
    home = f"lightning_prune.{room}"
    return cls.__module__ == home or cls.__module__.startswith(f"{home}.")


def example(room: str) -> str:
    """Return the name of a class of a room, for messages."""
    return _CONTRACTS[room].example


def contract(room: str) -> type:
    """Return the abstract base that the classes of a room derive from.

    Raises:
        ValueError: if there is no such room.
    """
    if room == "statistics":
        return _STATISTICS.load()
    if room not in _CONTRACTS:
        raise ValueError(unknown("room", room, _CONTRACTS))
    return _CONTRACTS[room].load()


def entries(room: str) -> tuple[Entry, ...]:
    """List the classes of a room in the order of their names.

    Args:
        room: a key of `rooms()`.

    Raises:
        ValueError: if there is no such room.
    """
    base = contract(room)
    found = [entry for file in _files(room) for entry in _entries_of_file(room, file, base)]
    return tuple(sorted(found, key=lambda entry: entry.name))


def get(room: str | Sequence[str], name: str) -> type:
    """Return the class of a room, or of one of several, by the name of its file or its own, in upper or lower case.

    Raises:
        ValueError: if the room has no such class; the message gives the nearest name.
    """
    chosen = [room] if isinstance(room, str) else list(room)
    for one in chosen:
        for file in _files(one):
            if any(same_name(name, known) for known in (file.name, *file.classes)):
                for entry in _entries_of_file(one, file, contract(one)):
                    if same_name(name, entry.name) or same_name(name, entry.cls.__name__):
                        return entry.cls
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", contract(chosen[0]).__name__).lower()
    raise ValueError(unknown(kind, name, [entry.cls.__name__ for one in chosen for entry in entries(one)]))


@functools.cache
def statistic(name: str) -> "type[Statistic]":
    """Return the class of a statistic by the name that a scorer's `needs` uses.

    Raises:
        ValueError: if there is no such statistic.
    """
    cls: type[Statistic] = get("statistics", name)
    return cls


@functools.cache
def _files(room: str) -> tuple[_File, ...]:
    """List the files of a room without importing them."""
    home = f"lightning_prune.{room}"
    spec = importlib.util.find_spec(home)
    assert spec is not None, home
    if not spec.submodule_search_locations:
        assert spec.origin is not None, home
        return (_File("", home, _classes(Path(spec.origin))),)
    found = []
    for folder in map(Path, spec.submodule_search_locations):
        for path in sorted(folder.rglob("*.py")):
            if path.stem != "__init__":
                module = ".".join((home, *path.relative_to(folder).with_suffix("").parts))
                found.append(_File(path.stem, module, _classes(path)))
    return tuple(found)


def _classes(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def _entries_of_file(room: str, file: _File, base: type) -> Iterator[Entry]:
    if not file.classes:
        return
    module = importlib.import_module(file.module)
    found = (cls for cls in _own_classes(module) if issubclass(cls, base) and cls is not base)
    classes = [cls for cls in found if not inspect.isabstract(cls)]
    is_alone = bool(file.name) and len(classes) == 1
    for cls in classes:
        own, shared = inspect.getdoc(cls) or "", inspect.getdoc(module) or ""
        yield Entry(
            room=room,
            name=file.name if is_alone else cls.__name__.lower(),
            cls=cls,
            summary=(shared if is_alone else own).partition("\n")[0],
            source=_source(own) or _source(shared),
        )


def _own_classes(module: ModuleType) -> list[type]:
    return [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]


def _source(text: str) -> str:
    """Return the `Source:` paragraph of a docstring on one line, or an empty string."""
    found = re.search(r"^Source:[ \t]*(.+(?:\n[ \t]+\S.*)*)", text, flags=re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""
