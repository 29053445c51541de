"""Rank the units of all targets together; each target keeps as many as it has above the common cut.

With scope `tensor` the masks are those of scope `global`, but no target falls below a floor.

Source: global magnitude pruning as in Blalock et al., What is the State of Neural Network Pruning, arXiv 2003.03033;
    the floor of 0.5 % kept is that of the threshold binarizer in huggingface/nn_pruning.
Limits: compares scores of different targets, which says something for magnitude and Taylor, less for row-wise Wanda.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_prune.base.types import Allocation, Ranking
from lightning_prune.granularity import num_kept

__all__ = ["GlobalRank"]


@dataclass(frozen=True, kw_only=True)
class GlobalRank(Allocation):
    """Let targets compete for the budget; `min_density` is the share of units every target keeps at least."""

    uses_scores: ClassVar[bool] = True
    min_density: float = 0.005

    def __post_init__(self) -> None:
        if not 0 <= self.min_density < 1:
            raise ValueError(f"min_density must be in [0, 1), got {self.min_density}")

    def split(self, sparsity: float, ranking: Ranking) -> dict[str, float]:
        """Return one sparsity per target; the unit-weighted mean is the sparsity asked for.

        Raises:
            ValueError: if min_density asks for more than the budget.
        """
        if 1 - sparsity < self.min_density:
            raise ValueError(f"min_density {self.min_density} is above the density {1 - sparsity:g} of the schedule")
        units = {name: ranking.num_units(name) for name in ranking.names}
        kept: dict[str, int] = {}
        while len(kept) < len(units):
            free = [name for name in ranking.names if name not in kept]
            left = num_kept(sparsity, sum(units.values())) - sum(kept.values())
            found = ranking.global_kept(left, free)
            floors = {name: math.ceil(self.min_density * units[name]) for name in free}
            starved = {name: floors[name] for name in free if found[name] < floors[name]}
            kept |= starved or found
        return {name: 1 - kept[name] / units[name] for name in ranking.names}
