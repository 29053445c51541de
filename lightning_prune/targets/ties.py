"""How much of a decision followed from the place of units and not from their scores: equal ones that stay and go.

Shapes: R x C units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TieCounts", "Ties", "count_ties", "extremes"]


@dataclass(frozen=True)
class Ties:
    """Of one target: which share of its units was chosen by place, and whether all its scores are equal."""

    share: float
    is_blind: bool


@dataclass(frozen=True)
class TieCounts:
    """Counts over the units of one target that were ranked, that is not pruned before.

    Equal units are those whose score is where the ranking was cut; of these only weights that are not zero already
    matter, since to prune a zero changes nothing.
    """

    num_ranked: int
    num_equal_kept: int
    num_equal_pruned: int
    num_equal_that_matter: int
    num_pruned: int
    num_that_matter: int
    num_rankings_that_differ: int
    num_rankings: int

    def judge(self, *, is_split: bool) -> Ties:
        """Return the verdict, given whether equal units of the ranking both stayed and went."""
        blind = self.num_rankings and not self.num_rankings_that_differ and self.num_pruned and self.num_that_matter
        return Ties(self.num_equal_that_matter / max(1, self.num_ranked) if is_split else 0.0, bool(blind))


def extremes(unit_RC: Tensor) -> Tensor:
    """Return (highest, minus lowest) score of the units not pruned before, of a whole target."""
    ranked = unit_RC > -torch.inf
    low = unit_RC.masked_fill(~ranked, torch.inf)
    if unit_RC.numel() == 0:
        return unit_RC.new_full((2,), -torch.inf)
    return torch.stack([unit_RC.max(), -low.min()])


def count_ties(
    unit_RC: Tensor, keep_RC: Tensor, matters_RC: Tensor, at_cut_RC: Tensor | None, *, differs: bool = False
) -> Tensor:
    """Count what `TieCounts` holds, as int64 of length 8; summed over shards it is that of a whole target.

    Args:
        unit_RC: scores, minus infinity for what was pruned before.
        keep_RC: the decision.
        matters_RC: whether anything but zeros is in a unit.
        at_cut_RC: which units equal the cut of the ranking; None if every row was ranked alone.
        differs: with `at_cut_RC`, whether the whole target's scores differ.
    """
    ranked = unit_RC > -torch.inf
    pruned = ranked & ~keep_RC
    if at_cut_RC is None:
        lowest_kept = unit_RC.masked_fill(~(keep_RC & ranked), torch.inf).amin(1, keepdim=True)
        highest_pruned = unit_RC.masked_fill(~pruned, -torch.inf).amax(1, keepdim=True)
        at_cut_RC = (unit_RC == highest_pruned) & (lowest_kept == highest_pruned)
        lowest = unit_RC.masked_fill(~ranked, torch.inf).amin(1)
        differing, rankings = (unit_RC.amax(1) > lowest).sum(), (ranked.sum(1) > 1).sum()
    else:
        differing, rankings = torch.tensor(int(differs)), torch.tensor(1)
    equal = at_cut_RC & ranked
    counts = (ranked, equal & keep_RC, equal & pruned, equal & matters_RC, pruned, ranked & matters_RC)
    return torch.stack([*(count.sum() for count in counts), differing.to(ranked.device), rankings.to(ranked.device)])
