"""One mechanism that can be taken away, and the tests that must then fail."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mechanism and the tests that hold it in place."""

    promise: str
    file: str
    code: str
    replacement: str
    tests: str
