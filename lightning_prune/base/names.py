"""Find the name that was meant: the nearest known one, and a message that fits on a line."""

import difflib
import reprlib
from collections.abc import Iterable

__all__ = ["brief", "nearest", "same_name", "shorten", "unknown"]

_LISTED = 160  # characters of known names in a message
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel = 2


def brief(value: object) -> str:
    """Show a value in a message, a long or nested one cut short."""
    return shorten(_repr.repr(value), 80)


def shorten(text: str, length: int) -> str:
    """Return a text on one line, the middle left out where it is longer than this many characters."""
    text = " ".join(text.split())
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[: length - 5 - half]} ... {text[len(text) - half :]}"


def same_name(one: str, other: str) -> bool:
    """Return whether two names differ in nothing but upper and lower case, hyphens and underscores."""
    plain = [name.replace("_", "").replace("-", "").casefold() for name in (one, other)]
    return plain[0] == plain[1]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like this one, upper and lower case alike, or None if none does."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[close[0]] if close else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Word the message for a name that is not known: what came, the nearest known name, and as many as fit."""
    names = sorted(known)
    shown = brief(name)
    if not names:
        return f"unknown {kind} {shown}; there is nothing to choose from here"
    guess = nearest(name[:200], names)
    hint = f"; did you mean {guess!r}?" if guess else ";"
    return f"unknown {kind} {shown}{hint} known: {_some(names)}"


def _some(names: list[str]) -> str:
    """Return names with commas, and how many more there are where they would be too long for a message."""
    total = 0
    for number, name in enumerate(names):
        total += len(name) + 2
        if total > _LISTED and number:
            return f"{', '.join(names[:number])} and {len(names) - number} more"
    return ", ".join(names)
