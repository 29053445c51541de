"""More density for small targets: density proportional to (O + I) / (O * I).

Source: Mocanu et al., arXiv 1707.04780 (Erdos-Renyi); Evci et al., Rigging the Lottery, arXiv 1911.11134, which also
    fixes a target dense where the rule asks for more than it has.

Shapes: O output features, I input features.
"""

from dataclasses import dataclass

from lightning_prune.base.types import Allocation, Ranking

__all__ = ["ErdosRenyi", "erdos_renyi_densities"]


def erdos_renyi_densities(shapes: dict[str, tuple[int, int]], density: float) -> dict[str, float]:
    """Solve for the scale that keeps `density` of all weights.

    Args:
        shapes: (O, I) per target.
        density: share of weights kept over all targets, in (0, 1].

    Returns:
        density per target, in (0, 1]; the weighted mean is `density`.
    """
    sizes = {name: o * i for name, (o, i) in shapes.items()}
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(sum(shapes[name]) for name in free) if free else 0.0
        densities = {name: 1.0 if name in dense else scale * sum(shapes[name]) / sizes[name] for name in shapes}
        over = {name for name in free if densities[name] > 1}
        if not over:
            return densities
        dense |= over


@dataclass(frozen=True)
class ErdosRenyi(Allocation):
    """Give targets with few weights per row and column a higher density."""

    def split(self, sparsity: float, ranking: Ranking) -> dict[str, float]:
        """Return one sparsity per target; the weighted mean is the sparsity asked for."""
        densities = erdos_renyi_densities({name: ranking.shape(name) for name in ranking.names}, 1 - sparsity)
        return {name: 1 - density for name, density in densities.items()}
