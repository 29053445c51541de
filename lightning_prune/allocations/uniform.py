"""The same sparsity for every target.

Source: the default of most papers, for example Sun et al., arXiv 2306.11695.
"""

from dataclasses import dataclass

from lightning_prune.base.types import Allocation, Ranking

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform(Allocation):
    """Give every target the sparsity of the schedule."""

    def split(self, sparsity: float, ranking: Ranking) -> dict[str, float]:
        """Return one sparsity per target."""
        return dict.fromkeys(ranking.names, sparsity)
