"""Score weights by the absolute gradient, averaged over recent optimizer steps.

Pruned weights keep receiving gradients and come back when theirs is large, as in dynamic sparse training.

Source: the growth criterion of Evci et al., Rigging the Lottery, arXiv 1911.11134, used for every weight.
Default scope: tensor. Default beta: our choice, an average over about ten steps.
Cost: one float32 number per weight; in training one more pass over the gradients a step.
Limits: a baseline: it forgets how large a weight is. Gradient clipping sees the gradients of pruned weights too.

Shapes: O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Gradient"]


@dataclass(frozen=True, kw_only=True)
class Gradient(Scorer):
    """Keep weights the loss pulls on most; see the module text."""

    dense_grad: ClassVar[bool] = True
    scope: Scope = "tensor"
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}; 0 uses the latest step alone")

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect."""
        return {"grad_magnitude": {"beta": self.beta}}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32, >= 0."""
        return stats["grad_magnitude"]
