"""Score weights by their square times the variance of their input: what a constant cannot stand for.

An input that hardly changes can be replaced by its mean in the bias, however large it is. No gradients.

Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (FLAP), arXiv 2312.11983,
    section 3.2, WIFV before it is summed over rows.
Default scope: row.
Cost: two float64 vectors of length I per target; scoring reads each weight once.
Limits: linear layers; the ranking supposes that the mean of what is removed goes into the bias.

Shapes: O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Fluctuation", "fluctuation_score"]


def fluctuation_score(weight_OI: Tensor, variance_I: Tensor) -> Tensor:
    """Multiply each weight's square by the variance of the input it reads.

    Args:
        weight_OI: weights in any float dtype; the arithmetic is float32.
        variance_I: variance of each input feature over all calibration tokens.

    Returns:
        score_OI, float32, >= 0. Higher means keep.

    Raises:
        ValueError: if the two disagree on I.
    """
    if weight_OI.shape[1] != variance_I.shape[0]:
        raise ValueError(
            f"weight has {weight_OI.shape[1]} input features, variance_I has {variance_I.shape[0]}; "
            "collect the variances from the layer that owns the weight"
        )
    return weight_OI.float().square() * variance_I.float()


@dataclass(frozen=True, kw_only=True)
class Fluctuation(Scorer):
    """Keep weights whose product with their input varies; see the module text."""

    scope: Scope = "row"

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect."""
        return {"input_moments": {}}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32."""
        return fluctuation_score(target.weight_OI, stats["input_moments"])
