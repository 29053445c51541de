"""Score weights by how far training has moved them away from zero.

Best while fine-tuning a pretrained model to few weights: keeps what grows, whatever its size.

Source: Sanh et al., Movement Pruning, arXiv 2005.07683, eq. 4, hard form. Differences: scores sum -weight * gradient
    directly instead of being trained by an optimizer; a pruned weight is zero, so its score stays where it was.
Default scope: tensor, as in the paper.
Cost: one float32 number per weight; one more pass over weights and gradients a step.
Limits: needs training; at one optimizer step it is noise. Scores may be negative.

Shapes: O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Movement"]


@dataclass(frozen=True, kw_only=True)
class Movement(Scorer):
    """Keep weights that move away from zero; see the module text."""

    scope: Scope = "tensor"

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect."""
        return {"movement": {}}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32."""
        return stats["movement"]
