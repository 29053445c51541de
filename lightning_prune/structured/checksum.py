"""Seal plain values that are kept in a file, so that a changed character is noticed when they are read again."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["check_seal", "sealed"]

_FIELD = "checksum"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that JSON can hold with their checksum beside them."""
    return {**values, _FIELD: _checksum(values)}


def check_seal(values: Mapping[str, Any], *, what: str, cure: str) -> None:
    """Check that values are those that were sealed.

    Args:
        values: as they were read.
        what: they are, for the message.
        cure: what to do.

    Raises:
        ValueError: if they are others.
    """
    found, due = values.get(_FIELD), _checksum(values)
    if found != due:
        raise ValueError(f"{what} is damaged: its checksum is {found!r}, that of its content {due!r}; {cure}")


def _checksum(values: Mapping[str, Any]) -> str:
    """Return the first 16 digits of the SHA-256 of the values as JSON gives them back."""
    plain = json.loads(json.dumps({key: value for key, value in values.items() if key != _FIELD}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
