"""Score weights by how active their input is, whatever the weight: whole inputs are kept or go.

Meant for shapes of holes that span rows (Channel) and for cutting units; no gradients.

Source: Muralidharan et al., Minitron, arXiv 2407.14679, section 2.2 (`minitron`); Shen et al., Pruning Large Language
    Models to Intra-module Low-rank Architecture with Transitional Activations (TransAct), arXiv 2407.05690 (`l2`).
Default scope: row; every row has the same scores.
Cost: one float64 vector of length I per target.
Limits: linear layers; blind to the weights that read an input.

Shapes: O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_prune.base.types import Scope, Scorer, Stats, Target

__all__ = ["Activation", "Aggregate", "activation_score"]

Aggregate = Literal["minitron", "l2"]
_STATISTICS = {"minitron": "activation", "l2": "input_norm"}


def activation_score(weight_OI: Tensor, activation_I: Tensor) -> Tensor:
    """Give every weight of a column the activation of the input it reads.

    Args:
        weight_OI: only its shape matters.
        activation_I: one number per input feature.

    Returns:
        score_OI, float32.

    Raises:
        ValueError: if the two disagree on I.
    """
    if weight_OI.shape[1] != activation_I.shape[0]:
        raise ValueError(
            f"weight has {weight_OI.shape[1]} input features, activation_I has {activation_I.shape[0]}; "
            "collect the activations from the layer that owns the weight"
        )
    return activation_I.float().repeat(weight_OI.shape[0], 1)


@dataclass(frozen=True, kw_only=True)
class Activation(Scorer):
    """Keep weights of active inputs; see the module text.

    Args:
        scope: the units ranked together.
        aggregate: `minitron` takes the mean of |x| over a sequence and the L2 norm of that over sequences; `l2` takes
            the L2 norm over all tokens.
    """

    scope: Scope = "row"
    aggregate: Aggregate = "minitron"

    def __post_init__(self) -> None:
        if self.aggregate not in get_args(Aggregate):
            raise ValueError(f"aggregate must be minitron or l2, got {self.aggregate!r}")

    @property
    def needs(self) -> Mapping[str, Mapping[str, float]]:
        """Return the statistics to collect."""
        return {_STATISTICS[self.aggregate]: {}}

    def score(self, target: Target, stats: Stats) -> Tensor:
        """Return score_OI, float32, >= 0."""
        return activation_score(target.weight_OI, stats[_STATISTICS[self.aggregate]])
