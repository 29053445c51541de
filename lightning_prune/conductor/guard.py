"""A bound on a logged metric: when it is crossed, pruning holds or goes back to the last good masks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_prune.base import distributed

__all__ = ["GoodMasks", "GuardMemory", "MetricGuard"]


@dataclass(frozen=True, kw_only=True)
class MetricGuard:
    """Watch one logged metric.

    `hold` stops mask changes until the metric is within its bounds again. `rollback` also goes back to the masks that
    held when the metric was last within bounds; weights that return take the value they had then, which costs one
    copy of the target weights. Both then go on with the schedule.
    """

    metric: str
    max: float | None = None
    min: float | None = None
    action: Literal["hold", "rollback"] = "hold"

    def __post_init__(self) -> None:
        if not self.metric.strip():
            raise ValueError("guard.metric is empty; give the name under which the trainer logs it")
        for name, bound in (("max", self.max), ("min", self.min)):
            if bound is not None and not math.isfinite(bound):
                raise ValueError(f"guard.{name} must be a finite number, got {bound}; a bound like it never fires")
        if self.max is None and self.min is None:
            raise ValueError(f"guard on {self.metric!r} has neither max nor min, so it has no effect; give one")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"guard on {self.metric!r} has min {self.min} above max {self.max}; swap them")
        if self.action not in ("hold", "rollback"):
            raise ValueError(f"guard action must be 'hold' or 'rollback', got {self.action!r}")

    def is_crossed(self, value: float) -> bool:
        """Return whether a value lies outside the bounds; NaN does."""
        too_high = self.max is not None and value > self.max
        too_low = self.min is not None and value < self.min
        return math.isnan(value) or too_high or too_low


@dataclass(frozen=True)
class GoodMasks:
    """What held when the metric was last within bounds: this process's rows, by target name."""

    sparsity: float
    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


@dataclass
class GuardMemory:
    """What the guard has decided so far: `is_late` asks for the update that was missed while pruning was held."""

    is_held: bool = False
    is_late: bool = False
    has_seen: bool = False
    good: GoodMasks | None = None

    def judge(self, guard: MetricGuard, value: float) -> Literal["crossed", "released"] | None:
        """Take in a value; return whether it has just left the bounds, or has just come back."""
        was_held, self.has_seen, self.is_held = self.is_held, True, guard.is_crossed(value)
        if self.is_held:
            return None if was_held else "crossed"
        self.is_late = self.is_late or was_held
        return "released" if was_held else None

    def remember(self, parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor], sparsity: float) -> None:
        """Copy masks and weights as the ones to go back to."""
        weights = {name: distributed.local(parameter.detach()).clone() for name, parameter in parameters.items()}
        self.good = GoodMasks(sparsity, {name: mask.clone() for name, mask in masks.items()}, weights)
