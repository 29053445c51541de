"""Score weights by their absolute value.

The baseline of every table; in gradual form, with a cubic ramp, the strongest simple recipe when there is training.

Source: Han et al., Learning both Weights and Connections, arXiv 1506.02626; gradual form: Zhu and Gupta, To prune, or
    not to prune, arXiv 1710.01878.
Default scope: tensor (layerwise).
Cost: reads each weight once; no statistic.
Limits: global scope can nearly empty a layer of small weights; the GlobalRank allocation has a floor.

Shapes: O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Magnitude", "magnitude_score"]


def magnitude_score(weight_OI: Tensor) -> Tensor:
    """Return score_OI, float32, >= 0: the absolute values."""
    return weight_OI.abs().float()


@dataclass(frozen=True, kw_only=True)
class Magnitude(Scorer):
    """Keep the largest weights; see the module text."""

    scope: Scope = "tensor"

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect: none."""
        return {}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32."""
        return magnitude_score(target.weight_OI)
