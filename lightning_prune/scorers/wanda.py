"""Score weights by magnitude times the norm of their input.

Keeps weights that carry much signal even when they are small. One pass over calibration data, no gradients.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695,
    "Pruning Metric".
Default scope: row, as in the paper.
Cost: one float64 vector of length I per target; scoring reads each weight once.
Limits: linear layers; an input that is always zero gives its whole column score 0.

Shapes: O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Wanda", "wanda_score"]


def wanda_score(weight_OI: Tensor, input_norm_I: Tensor) -> Tensor:
    """Multiply each weight's magnitude by the norm of the input it reads.

    Args:
        weight_OI: weights in any float dtype; the arithmetic is float32.
        input_norm_I: L2 norm of each input feature over all calibration tokens, not divided by their number.

    Returns:
        score_OI, float32, >= 0. Higher means keep.

    Raises:
        ValueError: if the two disagree on I.
    """
    if weight_OI.shape[1] != input_norm_I.shape[0]:
        raise ValueError(
            f"weight has {weight_OI.shape[1]} input features, input_norm_I has {input_norm_I.shape[0]}; "
            "collect the norms from the layer that owns the weight"
        )
    return weight_OI.abs().float() * input_norm_I


@dataclass(frozen=True, kw_only=True)
class Wanda(Scorer):
    """Keep weights that are large times their input; see the module text."""

    scope: Scope = "row"

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect."""
        return {"input_norm": {}}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32."""
        return wanda_score(target.weight_OI, stats["input_norm"])
