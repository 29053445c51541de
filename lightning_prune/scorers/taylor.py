"""Score weights by |weight * gradient|, averaged over recent optimizer steps.

Estimates to first order how much the loss changes when a weight is removed.

Source: Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771, section 3.1, absolute
    value in place of the square (the ranking is the same for one step); moving average as in PLATON, arXiv 2206.12562.
Default scope: tensor. Default beta: our choice, an average over about ten steps.
Cost: one float32 number per weight; in training one more pass over weights and gradients a step.
Limits: needs gradients: at least one optimizer step, or batches with labels for one-shot use.

Shapes: O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Taylor"]


@dataclass(frozen=True, kw_only=True)
class Taylor(Scorer):
    """Keep weights whose removal would change the loss most; see the module text."""

    scope: Scope = "tensor"
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}; 0 uses the latest step alone")

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect."""
        return {"weight_grad": {"beta": self.beta}}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32, >= 0."""
        return stats["weight_grad"]
