"""Find what a room offers, and suggest the nearest name for one it does not.

A room is a folder or a file of this package whose classes keep one contract. Opening a room imports its files, so that
the recipe parser knows their classes too; there is no table to edit.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from lightning_prune.types import Allocation, Granularity, Schedule, Scorer

if TYPE_CHECKING:
    from lightning_prune.statistic import Statistic

__all__ = ["Entry", "contract", "entries", "get", "nearest", "rooms", "statistic", "unknown"]

# Contracts that speak of nouns from floors above this file: room -> (module, class).
_FURTHER_CONTRACTS = {
    "structured": ("structured.method", "StructuredMethod"),
    "structured.depth.criteria": ("structured.depth.criteria", "Criterion"),
    "solvers.greedy_output": ("solvers.greedy_output", "OutputChooser"),
    "recovery.divergences": ("recovery.divergences", "Divergence"),
    "recovery.matching": ("recovery.matching", "StateDistance"),
}


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
    own = {"scorers": Scorer, "allocations": Allocation, "granularity": Granularity, "schedules": Schedule}
    return own | {room: _contract_of(module, name) for room, (module, name) in _FURTHER_CONTRACTS.items()}


def contract(room: str) -> type:
    """Return the abstract base that the classes of a room derive from.

    Raises:
        ValueError: if there is no such room.
    """
    if room == "statistics":
        return _statistics_contract()
    known = rooms()
    if room not in known:
        raise ValueError(unknown("room", room, known))
    return known[room]


def _contract_of(module: str, name: str) -> type:
    cls: type = getattr(importlib.import_module(f"lightning_prune.{module}"), name)
    return cls


def _statistics_contract() -> type:
    from lightning_prune.statistic import Statistic  # torchmetrics takes seconds to import

    return Statistic


def entries(room: str) -> tuple[Entry, ...]:
    """List the classes of a room in the order of their names.

    Args:
        room: a key of `rooms()`.

    Raises:
        ValueError: if there is no such room.
    """
    base = contract(room)
    module = importlib.import_module(f"lightning_prune.{room}")
    found = [entry for name, file in _files(module) for entry in _entries_of_file(room, name, file, base)]
    return tuple(sorted(found, key=lambda entry: entry.name))


def get(room: str | Sequence[str], name: str) -> type:
    """Return the class of a room, or of one of several, by its name or by its class name.

    Raises:
        ValueError: if the room has no such class; the message gives the nearest name.
    """
    chosen = [room] if isinstance(room, str) else list(room)
    offered = [entry for one in chosen for entry in entries(one)]
    for entry in offered:
        if name in (entry.name, entry.cls.__name__):
            return entry.cls
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", contract(chosen[0]).__name__).lower()
    raise ValueError(unknown(kind, name, [entry.cls.__name__ for entry in offered]))


@functools.cache
def statistic(name: str) -> "type[Statistic]":
    """Return the class of a statistic by the name that a scorer's `needs` uses.

    Raises:
        ValueError: if there is no such statistic.
    """
    cls: type[Statistic] = get("statistics", name)
    return cls


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like this one, upper and lower case alike, or None if none does."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[close[0]] if close else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Word the message for a name that is not known: what came, the nearest known name, and all of them."""
    names = sorted(known)
    if not names:
        return f"unknown {kind} {name!r}; there is nothing to choose from here"
    guess = nearest(name, names)
    hint = f"; did you mean {guess!r}?" if guess else ";"
    return f"unknown {kind} {name!r}{hint} known: {', '.join(names)}"


def _files(module: ModuleType) -> Iterator[tuple[str, ModuleType]]:
    """Yield (file name, module) for a folder and the folders in it; for a single file, an empty name and itself."""
    if not hasattr(module, "__path__"):
        yield "", module
        return
    for info in pkgutil.walk_packages(module.__path__, f"{module.__name__}."):
        if not info.ispkg:
            yield info.name.rpartition(".")[2], importlib.import_module(info.name)


def _entries_of_file(room: str, name: str, module: ModuleType, base: type) -> Iterator[Entry]:
    found = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and cls.__module__ == module.__name__
    ]
    classes = [cls for cls in found if not inspect.isabstract(cls)]
    is_alone = bool(name) and len(classes) == 1
    for cls in classes:
        own, shared = inspect.getdoc(cls) or "", inspect.getdoc(module) or ""
        yield Entry(
            room=room,
            name=name if is_alone else cls.__name__.lower(),
            cls=cls,
            summary=(shared if is_alone else own).partition("\n")[0],
            source=_source(own) or _source(shared),
        )


def _source(text: str) -> str:
    """Return the `Source:` paragraph of a docstring on one line, or an empty string."""
    found = re.search(r"^Source:[ \t]*(.+(?:\n[ \t]+\S.*)*)", text, flags=re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""
