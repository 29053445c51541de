"""When masks change and what sparsity holds then: pure functions of the optimizer step.

A moment is an optimizer step (a whole number) or a fraction of the training (a number with a point, 0.0 to 1.0).
Between `start` and `end` masks change every `interval`, and always at both ends.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field

from lightning_prune.base.types import Schedule

__all__ = ["Cosine", "Cubic", "Existing", "Geometric", "Linear", "Once", "Ramp", "moment_to_step"]

_MOST_STEPS = 10**12


def moment_to_step(moment: int | float, total_steps: int) -> int:
    """Turn a step or a fraction of training into an optimizer step."""
    return moment if isinstance(moment, int) else round(moment * total_steps)


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {value}; to remove a layer whole, leave it out of the model instead"
        )


def _check_moment(name: str, value: int | float) -> None:
    is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_STEPS
    if not is_step and not (isinstance(value, float) and 0 <= value <= 1):
        raise ValueError(
            f"{name} must be an optimizer step (a whole number from 0 to {_MOST_STEPS}) or a fraction of training in "
            f"[0.0, 1.0], got {value}"
        )


@dataclass(frozen=True, kw_only=True)
class Once(Schedule):
    """Prune to the final sparsity at one moment and hold the masks from then on.

    Source: the setting of one-shot papers, for example Sun et al., arXiv 2306.11695.
    """

    sparsity: float
    at: int | float = 0

    def __post_init__(self) -> None:
        _check_sparsity("sparsity", self.sparsity)
        _check_moment("at", self.at)
        if self.sparsity == 0:
            raise ValueError("sparsity is 0, which prunes nothing; give a value above 0 or remove the prune section")

    def resolve(self, total_steps: int) -> tuple[int, int, int]:
        """Return (start, end, interval) in optimizer steps.

        Raises:
            ValueError: if the moment lies beyond the training.
        """
        step = moment_to_step(self.at, total_steps)
        if step > total_steps:
            raise ValueError(f"schedule.at is step {step}, beyond the {total_steps} steps of this training; lower it")
        return step, step, 1

    def sparsity_at(self, step: int, total_steps: int) -> float:
        """Return the sparsity that holds after `step` optimizer steps."""
        return self.sparsity if step >= moment_to_step(self.at, total_steps) else 0.0

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether masks change after `step` optimizer steps."""
        return step == moment_to_step(self.at, total_steps)


@dataclass(frozen=True, kw_only=True)
class Existing(Schedule):
    """Take the zeros that the targets have when training starts as their masks, and hold them.

    A target of which less than a hundredth is zero has no mask: its zeros are chance. The sparsity is the model's own.

    Args:
        allow_dense: whether a model without such zeros is left as it is; else it is an error.

    Source: ours.
    """

    sparsity: float = field(default=0.0, init=False)
    allow_dense: bool = False

    def resolve(self, total_steps: int) -> tuple[int, int, int]:
        """Return (start, end, interval) in optimizer steps."""
        return 0, 0, 1

    def sparsity_at(self, step: int, total_steps: int) -> float:
        """Return 0: no sparsity is asked for."""
        return 0.0

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return False: masks do not change."""
        return False


@dataclass(frozen=True, kw_only=True)
class Ramp(Schedule):
    """Raise the sparsity from `initial` to `sparsity` between `start` and `end`.

    The default end leaves a quarter of the training for recovery.
    """

    sparsity: float
    initial: float = 0.0
    start: int | float = 0.0
    end: int | float = 0.75
    interval: int | float = 0.01

    def __post_init__(self) -> None:
        _check_sparsity("sparsity", self.sparsity)
        _check_sparsity("initial", self.initial)
        _check_moment("start", self.start)
        _check_moment("end", self.end)
        _check_moment("interval", self.interval)
        if self.initial >= self.sparsity:
            raise ValueError(
                f"sparsity must be above initial, got {self.sparsity} and {self.initial}; a ramp that does not rise "
                "prunes nothing"
            )
        if type(self.start) is type(self.end) and self.start >= self.end:
            raise ValueError(f"start must come before end, got {self.start} and {self.end}; use Once for one moment")
        if self.interval == 0:
            raise ValueError("interval must be above 0; it is the number of steps, or the fraction, between changes")

    @abstractmethod
    def curve(self, progress: float) -> float:
        """Return the sparsity at a progress in [0, 1] of the ramp."""

    def resolve(self, total_steps: int) -> tuple[int, int, int]:
        """Return (start, end, interval) in optimizer steps.

        Raises:
            ValueError: if the end lies before the start or beyond the training.
        """
        start = moment_to_step(self.start, total_steps)
        end = moment_to_step(self.end, total_steps)
        if end > total_steps:
            raise ValueError(
                f"schedule.end is step {end}, beyond the {total_steps} steps of this training, so the sparsity "
                f"{self.sparsity} would never be reached; lower it or give a fraction such as 0.75"
            )
        if start >= end:
            raise ValueError(
                f"schedule.start is step {start} and schedule.end step {end} of {total_steps}; start must come first"
            )
        return start, end, max(1, moment_to_step(self.interval, total_steps))

    def sparsity_at(self, step: int, total_steps: int) -> float:
        """Return the sparsity that holds after `step` optimizer steps, clamped to [0, sparsity]."""
        start, end, _ = self.resolve(total_steps)
        if step < start:
            return 0.0
        if step >= end:
            return self.sparsity
        return self.curve((step - start) / (end - start))

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether masks change after `step` optimizer steps."""
        start, end, interval = self.resolve(total_steps)
        return start <= step <= end and ((step - start) % interval == 0 or step == end)


class Linear(Ramp):
    """Add the same sparsity at every change.

    Source: a plain ramp.
    """

    def curve(self, progress: float) -> float:
        """Return the sparsity at a progress in [0, 1] of the ramp."""
        return self.initial + (self.sparsity - self.initial) * progress


class Cubic(Ramp):
    """Prune fast at first and slow down; half-way 87.5 % of the rise is done.

    Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878, eq. 1.
    """

    def curve(self, progress: float) -> float:
        """Return the sparsity at a progress in [0, 1] of the ramp."""
        return self.sparsity + (self.initial - self.sparsity) * (1 - progress) ** 3


class Cosine(Ramp):
    """Start and end gently.

    Source: half a cosine wave.
    """

    def curve(self, progress: float) -> float:
        """Return the sparsity at a progress in [0, 1] of the ramp."""
        return self.initial + (self.sparsity - self.initial) * (1 - math.cos(math.pi * progress)) / 2


class Geometric(Ramp):
    """Keep the same share of the remaining weights at every change.

    Source: Jin et al., The Journey Matters, arXiv 2501.12486 (density (1 - s)^progress).
    """

    def curve(self, progress: float) -> float:
        """Return the sparsity at a progress in [0, 1] of the ramp."""
        return 1 - (1 - self.initial) ** (1 - progress) * (1 - self.sparsity) ** progress
