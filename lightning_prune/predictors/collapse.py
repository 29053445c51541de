"""Notice a predictor whose masks no longer depend on what it reads.

The training loss does not show it: it equals that of one learned mask. What shows it: instructions get the same units,
and giving a sequence the mask of another instruction costs nothing.

Source: our measurement of two collapses and a healthy run; spreads of scores alone do not tell them apart (0.29 in a
    collapse, 0.18 in a healthy run), the cost of swapped instructions does (0.004 nats against 1.0).

Shapes: B instructions, U units, P pairs of instructions.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least

__all__ = ["CollapseGuard", "Conditioning", "overlap", "overlaps"]

logger = logging.getLogger(__name__)


def overlap(first_U: Tensor, second_U: Tensor) -> Tensor:
    """Return the Jaccard index of two choices of units: of those in any, how many are in both; (..., U) of bool."""
    both = (first_U & second_U).sum(-1)
    return both / (first_U | second_U).sum(-1).clamp(min=1)


def overlaps(choices: Sequence[Tensor]) -> list[list[float]]:
    """Return the Jaccard index of every two instructions, mean over groups; choices are (B, U) of bool for each."""
    pairs = [overlap(chosen_BU[:, None], chosen_BU[None]).float() for chosen_BU in choices]
    found: list[list[float]] = torch.stack(pairs).mean(0).tolist()
    return found


def rows_apart(masks: Sequence[Tensor]) -> Tensor:
    """Return for each row another one whose units differ most from its own."""
    chosen_BN = torch.cat([mask > 0 for mask in masks], dim=-1).float()
    return (chosen_BN @ chosen_BN.T).fill_diagonal_(math.inf).argmin(-1)


@dataclass(frozen=True)
class Conditioning:
    """How much masks depend on the instruction.

    Args:
        overlap: mean Jaccard index of the units of two instructions, over pairs and groups.
        by_group: the same for each group.
        spread: deviation of scores across instructions, over that across units.
        swap_cost: loss with the mask of another instruction, less that with its own, in nats per token; NaN if it was
            not measured, as the losses are.
        own_loss: with the mask of its own instruction, in nats per token.
        whole_loss: with all units.
        choices: which units the instructions chose, (B, U) of bool for each group, on this process.
    """

    overlap: float
    by_group: tuple[float, ...]
    spread: float
    swap_cost: float = math.nan
    own_loss: float = math.nan
    whole_loss: float = math.nan
    choices: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(
        cls,
        masks: Sequence[Tensor],
        scores: Sequence[Tensor],
        *,
        own_loss: float = math.nan,
        swapped_loss: float = math.nan,
        whole_loss: float = math.nan,
    ) -> "Conditioning":
        """Return it for the masks and scores of some instructions, (B, U) for each group, and losses under masks."""
        num = len(masks[0])
        first, second = torch.triu_indices(num, num, offset=1) if num > 1 else torch.zeros(2, 1, dtype=torch.long)
        by_group = tuple(float(overlap(mask[first] > 0, mask[second] > 0).mean()) for mask in masks)
        spreads = [float(one.std(0).mean() / one.std(-1).mean().clamp(min=1e-9)) for one in scores] if num > 1 else [0]
        return cls(
            overlap=sum(by_group) / len(by_group),
            by_group=by_group,
            spread=sum(spreads) / len(spreads),
            swap_cost=swapped_loss - own_loss,
            own_loss=own_loss,
            whole_loss=whole_loss,
            choices=tuple(mask > 0 for mask in masks),
        )

    def mean_of_ranks(self, device: torch.device) -> "Conditioning":
        """Return the mean over all processes, which then decide alike; collective."""
        numbers = [self.overlap, self.spread, self.swap_cost, self.own_loss, self.whole_loss, *self.by_group, 1.0]
        total = distributed.sum_everywhere(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
        shared, spread, cost, own, whole, *by_group = (number / total[-1] for number in total[:-1])
        return Conditioning(shared, tuple(by_group), spread, cost, own, whole, self.choices)

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log."""
        found = {"overlap": self.overlap, "score_spread": self.spread, "swap_cost": self.swap_cost}
        found |= {"own_loss": self.own_loss, "whole_loss": self.whole_loss}
        return {name: value for name, value in found.items() if not math.isnan(value)}


@dataclass(frozen=True, kw_only=True)
class CollapseGuard:
    """When a predictor counts as collapsed, and what happens then.

    Args:
        every: optimizer steps between two measurements, from the end of the ramp on.
        num_sequences: measured with.
        min_swap_cost: in nats per token; below it, and
        max_overlap: above it, the masks do not depend on the instruction.
        stops: whether the training then ends with an error, or goes on with a warning.
    """

    every: int = 100
    num_sequences: int = 16
    min_swap_cost: float = 0.02
    max_overlap: float = 0.9
    stops: bool = False

    def __post_init__(self) -> None:
        at_least(1, every=self.every)
        at_least(2, num_sequences=self.num_sequences)
        if not 0 < self.max_overlap <= 1:
            raise ValueError(f"max_overlap must be in (0, 1], got {self.max_overlap}")

    def has_collapsed(self, found: Conditioning) -> bool:
        """Return whether masks no longer depend on the instruction."""
        costs_nothing = math.isnan(found.swap_cost) or found.swap_cost < self.min_swap_cost
        return costs_nothing and found.overlap > self.max_overlap

    def sentence(self, found: Conditioning) -> str:
        """Return what is said of a collapse."""
        return (
            f"the masks no longer depend on the instruction: two instructions share {found.overlap:.0%} of their units "
            f"and swapping them costs {found.swap_cost:.3f} nats per token. This model is one fixed mask. Start from "
            "importance (start: {num_steps: 400}), lower the spread of the head or raise its rate, and look whether "
            "the instructions differ"
        )
