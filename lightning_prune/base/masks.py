"""Scores and a budget become masks; masks are applied, packed to bits, compared and saved.

Exactly as many units stay as asked for; ties go to the lowest index. Ranking within a tensor or over all of them
counts the bit patterns of the scores, so that it sorts nothing and shards exchange counts instead of weights.

Shapes: R x C units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.base import distributed

__all__ = [
    "Cut",
    "at_cut",
    "check_scores",
    "content_hash",
    "find_cut",
    "keep_above",
    "keep_rows",
    "pack",
    "unpack",
]

_NUM_BINS = 1 << 16


def check_scores(name: str, score: Tensor) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        ValueError: if any score is NaN or infinite.
    """
    if not bool(torch.isfinite(score).all()):
        raise ValueError(
            f"scores of {name} contain NaN or infinity, so no mask can be chosen; check the loss and the "
            "weights for NaN, or lower the learning rate"
        )


def keep_rows(unit_RC: Tensor, num_keep: int) -> Tensor:
    """Keep the `num_keep` best units of every row.

    Returns:
        keep_RC, bool, exactly `num_keep` True in every row; ties go to the lowest column.
    """
    if num_keep >= unit_RC.shape[1] or unit_RC.numel() == 0:
        return torch.ones_like(unit_RC, dtype=torch.bool)
    lowest = unit_RC.kthvalue(unit_RC.shape[1] - num_keep + 1, dim=1, keepdim=True).values
    keep = unit_RC > lowest
    ties = unit_RC == lowest
    missing = num_keep - torch.count_nonzero(keep, dim=1)
    if bool((torch.count_nonzero(ties, dim=1) != missing).any()):
        ties &= ties.cumsum(1) <= missing[:, None]
    return keep | ties


def _sortable(score: Tensor) -> Tensor:
    """Return int32 keys in the order of the float32 scores, minus zero counted as zero."""
    bits = (score.reshape(-1) + 0.0).view(torch.int32)
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # negative floats have their order reversed


def _bin_holding(histogram: Tensor, num_keep: int) -> tuple[int, int]:
    """Return the bin that holds the `num_keep`-th best, and how many lie in better bins."""
    better = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(better, num_keep))
    above = int(better[position - 1]) if position else 0
    return histogram.numel() - 1 - position, above


@dataclass(frozen=True)
class Cut:
    """Where a ranking over several targets ends: all units with a key above `key` stay, and some that equal it."""

    key: int
    num_above: dict[str, int]
    num_ties: dict[str, int]

    def num_kept(self) -> dict[str, int]:
        """Return how many units of each target stay."""
        return {name: self.num_above[name] + self.num_ties[name] for name in self.num_above}


def find_cut(
    names: Sequence[str],
    num_keep: int,
    *,
    unit: Callable[[str], Tensor],
    total: Callable[[str, Tensor], Tensor],
) -> Cut:
    """Find the cut that keeps exactly the best `num_keep` units of several targets.

    Args:
        names: the targets ranked together; ties go to the first of them, then to the lowest index.
        num_keep: at least 1 and at most the number of units.
        unit: gives a target's unit scores on this process; asked three times for each of several targets.
        total: sums counts over the processes that share a target.
    """
    only = _sortable(unit(names[0])) if len(names) == 1 else None

    def keys_of(name: str) -> Tensor:
        return _sortable(unit(name)) if only is None else only

    high = low = None
    for name in names:
        bins = (keys_of(name) >> 16).add_(_NUM_BINS // 2)
        counts = total(name, torch.bincount(bins, minlength=_NUM_BINS))
        high = counts if high is None else high + counts
    assert high is not None, "find_cut needs at least one target"
    high_bin, above = _bin_holding(high, num_keep)
    prefix = high_bin - _NUM_BINS // 2
    for name in names:
        keys = keys_of(name)
        counts = total(name, torch.bincount(keys[keys >> 16 == prefix] & 0xFFFF, minlength=_NUM_BINS))
        low = counts if low is None else low + counts
    assert low is not None
    low_bin, above_low = _bin_holding(low, num_keep - above)
    key, above = (prefix << 16) | low_bin, above + above_low
    if len(names) == 1:
        return Cut(key=key, num_above={names[0]: above}, num_ties={names[0]: num_keep - above})
    return _share_ties(names, key, num_keep - above, keys_of, total)


def _share_ties(
    names: Sequence[str],
    key: int,
    num_ties: int,
    keys_of: Callable[[str], Tensor],
    total: Callable[[str, Tensor], Tensor],
) -> Cut:
    """Count what lies above a cut in each target, and give the ties to the first targets that have any."""
    above, kept_ties = {}, {}
    for name in names:
        keys = keys_of(name)
        both = total(name, torch.stack([torch.count_nonzero(keys > key), torch.count_nonzero(keys == key)]))
        above[name], ties = (int(count) for count in both)
        kept_ties[name] = min(ties, num_ties)
        num_ties -= kept_ties[name]
    return Cut(key=key, num_above=above, num_ties=kept_ties)


def at_cut(unit_RC: Tensor, cut: Cut) -> Tensor:
    """Return which units have the score where a cut was made."""
    return (_sortable(unit_RC) == cut.key).reshape(unit_RC.shape)


def keep_above(unit_RC: Tensor, cut: Cut, name: str, parameter: Tensor, *, whole: bool) -> Tensor:
    """Keep the units of one target that a cut leaves.

    Args:
        unit_RC: this process's units, or all of them with `whole`.
        cut: from `find_cut` over the same scores.
        name: the target.
        parameter: how the target is sharded.
        whole: whether every process holds all units.

    Returns:
        keep_RC, bool.
    """
    keys = _sortable(unit_RC)
    ties = keys == cut.key
    quota = cut.num_ties[name]
    count = torch.count_nonzero(ties)
    if not whole:
        before, everywhere = distributed.gather_counts(count, parameter)
        if int(everywhere) != quota:
            quota = max(0, quota - int(before))
    if int(count) > quota:
        ties &= ties.cumsum(0) <= quota
    return ((keys > cut.key) | ties).reshape(unit_RC.shape)


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape to bits, lowest bit first.

    Returns:
        uint8 of length ceil(numel / 8).
    """
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    bits = torch.zeros(padded.shape[0], dtype=torch.uint8, device=mask.device)
    for position in range(8):
        bits |= padded[:, position] << position
    return bits


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack`.

    Raises:
        ValueError: if the number of bytes does not fit the shape.
    """
    numel = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or bits.numel() != -(-numel // 8):
        raise ValueError(f"a packed mask of shape {tuple(shape)} needs {-(-numel // 8)} bytes, got {bits.numel()}")
    positions = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> positions) & 1).bool().reshape(-1)[:numel].reshape(tuple(shape))


def content_hash(mask: Tensor) -> Tensor:
    """Return an int64 number that depends on every bit and its place, computed where the mask lies."""
    bits = pack(mask)
    words = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(torch.int64)
    mixed = words + torch.arange(words.numel(), device=mask.device) * 0x1E3779B97F4A7C15
    for _ in range(2):  # shifted right without its sign, or a word and its complement would look alike
        mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * 0x3F58476D1CE4E5B9
    return (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)).sum()
