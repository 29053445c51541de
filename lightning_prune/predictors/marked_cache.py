"""Remember on a key/value cache the masks that it was filled under, row by row, wherever its rows go.

A decoding loop of one's own may put the rows of a cache in another order, select some or repeat them. The masks then
take the same way; where the rows were changed by other means, so that their number is another, the cache is refused.

Shapes: B rows, U units.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["mark", "masks_of"]

_MASKS = "_lightning_prune_masks"
_MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {  # by the name of the cache's method
    "reorder_cache": lambda mask_BU, rows: mask_BU.index_select(0, rows.to(mask_BU.device)),
    "batch_select_indices": lambda mask_BU, rows: mask_BU[rows.to(mask_BU.device)],
    "batch_repeat_interleave": lambda mask_BU, repeats: mask_BU.repeat_interleave(repeats, dim=0),
}


class _Move:
    """Stands in the place of a method that moves the rows of a cache, and moves those of its masks too."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name, self.plain = cache, name, getattr(cache, name)

    def __call__(self, rows: Any) -> Any:
        result = self.plain(rows)
        masks = getattr(self.cache, _MASKS)
        setattr(self.cache, _MASKS, [mask if len(mask) == 1 else _MOVES[self.name](mask, rows) for mask in masks])
        return result


def mark(cache: Any, masks: Sequence[Tensor]) -> None:
    """Note the masks, (B, U) or (1, U) each, that the rows of a cache were filled under."""
    setattr(cache, _MASKS, list(masks))
    if torch.compiler.is_compiling():
        return
    for name in _MOVES:
        if hasattr(cache, name) and not isinstance(vars(cache).get(name), _Move):
            setattr(cache, name, _Move(cache, name))


def masks_of(cache: Any, num_rows: int) -> list[Tensor] | None:
    """Return the masks for the rows of a call that goes on with a cache; None for a cache that is empty.

    Raises:
        ValueError: if another model filled the cache, or its rows are not those that were masked.
    """
    if cache is None or not int(cache.get_seq_length()):
        return None
    found: list[Tensor] | None = getattr(cache, _MASKS, None)
    if found is None:
        raise ValueError(
            "this key/value cache was filled by another model or another sub-network, so it belongs to another mask; "
            "start with an empty cache"
        )
    if len(found[0]) not in (1, num_rows):
        raise ValueError(
            f"a key/value cache that {len(found[0])} rows filled is read by {num_rows}, and nothing says which row "
            "has which mask; move its rows by reorder_cache, batch_select_indices or batch_repeat_interleave"
        )
    return found
