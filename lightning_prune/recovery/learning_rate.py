"""One learning-rate schedule across pruning and recovery: no restart, whatever happens to the number of steps.

The rate is a share of each parameter group's own base rate. It rises linearly in the warm-up and falls to `final` at
the end. Where a resume changes the length of the training, what is left of the curve is stretched over what is left of
the steps: no jump, no second warm-up, no rise. A second training may go on where the first one stopped.

Source: our own rule. Cosine: Loshchilov and Hutter, SGDR, arXiv 1608.03983, eq. 5, without restarts. That the pruning
    and the recovery share one falling schedule follows Jin et al., The Journey Matters, arXiv 2501.12486.
Cost: none.
Limits: steps of the scheduler must be optimizer steps.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_prune.schedules import moment_to_step

__all__ = ["ContinuedSchedule", "Curve", "LearningRate", "planned", "stretched"]

Decay = Literal["cosine", "linear", "constant"]
Knots = tuple[tuple[int, float], ...]
_FINAL = 0.1


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The shape of the schedule; see the module text.

    Args:
        warmup: how long the rate rises: optimizer steps (a whole number) or a fraction of training.
        decay: how it falls afterwards; `constant` does not.
        final: share of the base rate at the end, in [0, 1]; None is 0.1, or 1 where the rate is constant.
        total_steps: optimizer steps of pruning and recovery together, where they are two trainings; None for those of
            the training at hand.
        continues: a checkpoint of the training before, whose schedule this training goes on with; None if it is the
            first. Without warm-up then; what is left of the curve falls over this training's steps.

    Raises:
        ValueError: if a value is out of its range or has no effect.
    """

    warmup: int | float = 0
    decay: Decay = "cosine"
    final: float | None = None
    total_steps: int | None = None
    continues: str | None = None

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay must be cosine, linear or constant, got {self.decay!r}")
        if not self.warmup >= 0 or (isinstance(self.warmup, float) and self.warmup >= 1):
            raise ValueError(
                "warmup must be an optimizer step (a whole number >= 0) or a fraction of training in [0.0, 1.0), got "
                f"{self.warmup}"
            )
        if self.final is not None and not 0 <= self.final <= 1:
            raise ValueError(f"final must be a share of the base rate in [0, 1], got {self.final}")
        if self.final is not None and self.decay == "constant":
            raise ValueError("final has no effect on a constant rate; leave it out, or use cosine or linear")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps must be 1 or more, got {self.total_steps}; None takes the trainer's")

    @property
    def last(self) -> float:
        """Return the share of the base rate at the end."""
        if self.final is not None:
            return self.final
        return 1.0 if self.decay == "constant" else _FINAL


@dataclass(frozen=True)
class Curve:
    """The share of the base rate as a pure function of the optimizer step, counted over all trainings.

    `rise` holds (step, share) of the warm-up, `fall` (step, progress) of what comes after it; between two of them
    both go straight. A resume with another length adds a knot.
    """

    decay: Decay
    final: float
    rise: Knots
    fall: Knots

    @property
    def end(self) -> int:
        """Return the step at which the curve ends."""
        return self.fall[-1][0]

    def share(self, step: int) -> float:
        """Return the share of the base rate that the step after `step` steps is taken with."""
        top_step, top = self.rise[-1]
        if step < top_step:
            return _between(self.rise, step)
        progress = _between(self.fall, step)
        if self.decay == "constant":
            return top
        shape = (1 + math.cos(math.pi * progress)) / 2 if self.decay == "cosine" else 1 - progress
        return self.final + (top - self.final) * shape

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists."""
        knots = {name: [list(knot) for knot in getattr(self, name)] for name in ("rise", "fall")}
        return {"decay": self.decay, "final": self.final, **knots}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Curve":
        """Undo `as_dict`."""
        rise, fall = (tuple((int(step), float(value)) for step, value in values[name]) for name in ("rise", "fall"))
        return Curve(values["decay"], float(values["final"]), rise, fall)


def planned(options: LearningRate, total_steps: int) -> Curve:
    """Return the curve of a training that starts at step 0.

    The first step is taken with 1 / (warm-up steps + 1) of the rate, and the one after the warm-up with all of it.

    Raises:
        ValueError: if the warm-up is not shorter than the training.
    """
    top_step = _top_step(options, total_steps)
    rise: Knots = ((0, 1 / (top_step + 1)), (top_step, 1.0)) if top_step else ((0, 1.0),)
    return Curve(options.decay, options.last, rise, ((top_step, 0.0), (total_steps, 1.0)))


def stretched(curve: Curve, options: LearningRate, step: int, total_steps: int) -> Curve:
    """Return the curve that goes on from a step of another one and ends at `total_steps`.

    It is the other one up to `step`. From there on it holds what was left of it, stretched or pressed together, or,
    if `options` ask for another decay or end, a fall of their own from the value at `step`. It never rises after the
    warm-up, and a training that is shorter than its warm-up had been falls from where it stands.

    Args:
        curve: so far.
        options: of the training that goes on.
        step: optimizer steps taken by then, of all trainings.
        total_steps: of all trainings.

    Raises:
        ValueError: as for `planned`, while the warm-up is not over.
    """
    has_same_shape = (curve.decay, curve.final) == (options.decay, options.last)
    if total_steps <= step or (total_steps == curve.end and has_same_shape):
        return curve
    value = curve.share(step)
    if step < curve.rise[-1][0]:
        top_step = _top_step(options, total_steps)
        rise = (*_before(curve.rise, step), (step, value))
        if top_step > step:
            rise = (*rise, (top_step, 1.0))
        top_step = max(top_step, step)
        return Curve(options.decay, min(options.last, rise[-1][1]), rise, ((top_step, 0.0), (total_steps, 1.0)))
    if has_same_shape:
        fall = (*_before(curve.fall, step), (step, _between(curve.fall, step)), (total_steps, 1.0))
        return dataclasses.replace(curve, fall=fall)
    return Curve(options.decay, min(options.last, value), ((step, value),), ((step, 0.0), (total_steps, 1.0)))


class ContinuedSchedule(LRScheduler):
    """Sets the rates of an optimizer by one curve that survives resumes and goes on in a second training.

    It is stepped once per optimizer step. Loading a state that was saved under another number of steps stretches
    what is left of the curve.

    Args:
        optimizer: its groups keep their own base rates.
        options: the shape.
        total_steps: optimizer steps of this training.
        state: of the schedule of the training before, where this one goes on with it.

    Raises:
        ValueError: if the steps do not fit the options or the state.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: LearningRate,
        *,
        total_steps: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"the number of training steps must be known, got {total_steps}; set max_steps")
        self.options, self.total_steps = options, total_steps
        self.first_step = 0 if state is None else _steps_taken(state)
        end = _end(options, self.first_step, total_steps)
        if state is None:
            self.curve = planned(options, end)
        else:
            so_far = Curve.from_dict(state["curve"])
            self.curve = stretched(_without_rise(so_far, self.first_step), options, self.first_step, end)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of every group at this step."""
        share = self.curve.share(self.first_step + self.last_epoch)
        return [rate * share for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far and the place on it, as plain numbers, strings and lists.

        `lr_lambdas` is empty; it lets torch's LambdaLR, which most trainers make, load the state too.
        """
        return {
            "curve": self.curve.as_dict(),
            "first_step": self.first_step,
            "last_epoch": self.last_epoch,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "_step_count": self._step_count,
            "_last_lr": [float(rate) for rate in self.get_last_lr()],
            "lr_lambdas": [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state of this training, whose number of steps may have changed since.

        Raises:
            ValueError: if the state is another scheduler's, or the optimizer has other groups.
        """
        step = _steps_taken(state_dict)
        if len(state_dict["base_lrs"]) != len(self.base_lrs):
            raise ValueError(
                f"the saved schedule has {len(state_dict['base_lrs'])} parameter groups, the optimizer "
                f"{len(self.base_lrs)}; to go on in another training, name the checkpoint in learning_rate.continues"
            )
        self.first_step, self.last_epoch = int(state_dict["first_step"]), int(state_dict["last_epoch"])
        self.base_lrs = [float(rate) for rate in state_dict["base_lrs"]]
        end = _end(self.options, self.first_step, self.total_steps)
        self.curve = stretched(Curve.from_dict(state_dict["curve"]), self.options, step, end)
        self._step_count = int(state_dict["_step_count"])
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _top_step(options: LearningRate, total_steps: int) -> int:
    top_step = moment_to_step(options.warmup, total_steps)
    if top_step >= total_steps:
        raise ValueError(
            f"learning_rate.warmup takes {top_step} steps, all of the {total_steps} steps of this training or more; "
            "lower it, or give a fraction such as 0.1"
        )
    return top_step


def _end(options: LearningRate, first_step: int, total_steps: int) -> int:
    """Return the last step of the curve for a training that starts at `first_step` of it."""
    if options.total_steps is None:
        return first_step + total_steps
    if options.total_steps < first_step + total_steps:
        raise ValueError(
            f"learning_rate.total_steps is {options.total_steps}, but the training ends at step "
            f"{first_step + total_steps}; raise it to the steps of pruning and recovery together"
        )
    return options.total_steps


def _steps_taken(state: Mapping[str, Any]) -> int:
    if not {"curve", "first_step", "last_epoch", "base_lrs"} <= state.keys():
        raise ValueError(
            "the saved learning-rate schedule is another scheduler's, so this one cannot go on from it; start a new "
            "training from the weights, or leave learning_rate out"
        )
    return int(state["first_step"]) + int(state["last_epoch"])


def _without_rise(curve: Curve, step: int) -> Curve:
    """Return the curve as it is from a step on, with a warm-up that is not over ended there."""
    if step >= curve.rise[-1][0]:
        return curve
    value = curve.share(step)
    fall = ((step, 0.0), *curve.fall[1:])
    return Curve(curve.decay, min(curve.final, value), (*_before(curve.rise, step), (step, value)), fall)


def _between(knots: Sequence[tuple[int, float]], step: int) -> float:
    """Return the value at a step on the straight lines between knots, and that of the nearer end beyond them."""
    if step <= knots[0][0]:
        return knots[0][1]
    if step >= knots[-1][0]:
        return knots[-1][1]
    right = bisect.bisect_right([knot[0] for knot in knots], step)
    (start, low), (end, high) = knots[right - 1], knots[right]
    return low + (high - low) * (step - start) / (end - start)


def _before(knots: Knots, step: int) -> Knots:
    return tuple(knot for knot in knots if knot[0] < step)
