"""Keep the models that were used last, within a budget of bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import nn

from lightning_prune.base.bounds import at_least

__all__ = ["ModelCache"]


@dataclass
class _Kept:
    model: nn.Module
    num_bytes: int
    keys: set[Hashable] = field(default_factory=set)


class ModelCache:
    """Holds models by what asked for them; equal ones are held once, and the one not used for longest goes first.

    Args:
        num_bytes: that all models together may have, apart from what they share; 0 keeps none.
    """

    def __init__(self, num_bytes: int) -> None:
        at_least(0, cache_bytes=num_bytes)
        self.budget = num_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._digest_of: dict[Hashable, str] = {}

    @property
    def num_bytes(self) -> int:
        """Return the bytes that are held."""
        return sum(kept.num_bytes for kept in self._kept.values())

    def __len__(self) -> int:
        """Return how many models are held."""
        return len(self._kept)

    def get(self, key: Hashable, digest: str | None = None) -> nn.Module | None:
        """Return the model of a key, or else that of a digest, which then is the key's too; None if there is none."""
        found = self._digest_of.get(key, digest)
        if found is None or found not in self._kept:
            return None
        self._kept.move_to_end(found)
        self._kept[found].keys.add(key)
        self._digest_of[key] = found
        return self._kept[found].model

    def digest(self, key: Hashable) -> str | None:
        """Return the digest of the model that a key has; None if it is not held."""
        return self._digest_of.get(key)

    def put(self, key: Hashable, digest: str, model: nn.Module, num_bytes: int) -> None:
        """Keep a model; one that is larger than the budget is not kept, and nothing goes for it."""
        if num_bytes > self.budget:
            return
        self._kept[digest] = _Kept(model, num_bytes, {key})
        self._digest_of[key] = digest
        while self.num_bytes > self.budget:
            _, gone = self._kept.popitem(last=False)
            for known in gone.keys:
                self._digest_of.pop(known, None)

    def clear(self) -> None:
        """Let all models go."""
        self._kept.clear()
        self._digest_of.clear()
