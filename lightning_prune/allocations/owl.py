"""More density for blocks with many outlier scores (OWL).

Source: Yin et al., Outlier Weighed Layerwise Sparsity, arXiv 2310.05175: outlier ratio of a block = share of its
    scores above m times their mean; densities lie in a band of width 2 * lambda around the target. Difference: the
    mean over blocks is weighted by their number of weights, so that the sparsity asked for is met exactly.
Defaults: m = 5, lambda = 0.08, the paper's for LLaMA-7B at 70 %.
Limits: of use above about 60 % sparsity; with a scorer other than Wanda the ratio is taken over that scorer's scores.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_prune.base.types import Allocation, Ranking

__all__ = ["OWL", "block_of", "owl_densities"]


def block_of(name: str) -> str:
    """Return a target's block: its name up to the first number, or the name itself."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found.group() if found else name


def owl_densities(ratios: list[float], weights: list[int], density: float, lamda: float) -> list[float]:
    """Spread outlier ratios over a band of densities.

    Args:
        ratios: share of outliers per block.
        weights: number of weights per block.
        density: weighted mean density wanted, in (0, 1].
        lamda: half the width of the band.

    Returns:
        density per block; the band is narrowed where it would leave (0, 1].
    """
    low, high = min(ratios), max(ratios)
    spread = [2 * lamda * (ratio - low) / (high - low) if high > low else 0.0 for ratio in ratios]
    mean = sum(u * w for u, w in zip(spread, weights, strict=True)) / sum(weights)
    up, down = max(spread) - mean, mean - min(spread)
    narrow = min(1.0, (1 - density) / up if up else 1.0, 0.99 * density / down if down else 1.0)
    return [narrow * (u - mean) + density for u in spread]


@dataclass(frozen=True, kw_only=True)
class OWL(Allocation):
    """Prune blocks with many outliers less; see the module text."""

    uses_scores: ClassVar[bool] = True
    m: float = 5.0
    lamda: float = 0.08

    def __post_init__(self) -> None:
        if self.m <= 0 or not 0 < self.lamda < 0.5:
            raise ValueError(f"OWL needs m > 0 and lamda in (0, 0.5), got m={self.m}, lamda={self.lamda}")

    def split(self, sparsity: float, ranking: Ranking) -> dict[str, float]:
        """Return one sparsity per target, the same within a block; the weighted mean is the sparsity asked for."""
        blocks: dict[str, list[str]] = {}
        for name in ranking.names:
            blocks.setdefault(block_of(name), []).append(name)
        ratios = [self._outlier_ratio(names, ranking) for names in blocks.values()]
        weights = [sum(ranking.num_weights(name) for name in names) for names in blocks.values()]
        densities = owl_densities(ratios, weights, 1 - sparsity, self.lamda)
        pairs = zip(blocks.values(), densities, strict=True)
        return {name: 1 - density for names, density in pairs for name in names}

    def _outlier_ratio(self, names: list[str], ranking: Ranking) -> float:
        total = count = above = 0.0
        for name in names:
            total += float(ranking.sum(name, ranking.unit(name).clamp(min=0).sum(dtype=torch.float64)))
            count += ranking.num_units(name)
        for name in names:
            above += float(ranking.sum(name, (ranking.unit(name) > self.m * total / count).sum()))
        return above / count
