"""What is said aloud when a training ends and not everything came as promised."""

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_prune.base.types import Report

__all__ = ["Ending", "breaches", "remarks"]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a training ended.

    Args:
        report: of the weights as they are.
        step: optimizer steps taken.
        end: the step at which the schedule ends.
        total_steps: that were planned.
        held: the sparsity of the masks.
        promised: the sparsity asked for.
        differences: between the weights and the masks.
        behind: what is to be said of targets whose masks could not be chosen when they were due; empty if none.
        has_failed: whether an error or an interruption ended it.
        guarded: the metric that the guard keeps pruning back for; None if it does not.
        unseen_metric: what the guard waited for in vain.
    """

    report: Report
    step: int
    end: int
    total_steps: int
    held: float
    promised: float
    differences: tuple[str, ...] = ()
    behind: str = ""
    has_failed: bool = False
    guarded: str | None = None
    unseen_metric: str | None = None


def breaches(ending: Ending) -> Iterator[str]:
    """Yield a sentence for everything in which the model is not what was promised."""
    if ending.step == 0 and not ending.has_failed:
        yield (
            f"no optimizer step was seen; sparsity is {ending.report.sparsity:.4g}. Every batch was skipped, or the "
            "weights are changed by what never calls a torch optimizer's step (such as LOMO, in the backward pass): "
            "use an optimizer that torch steps"
        )
    elif ending.held < ending.promised - 1e-9 and ending.guarded is None:
        yield _short(ending)
    if ending.behind:
        yield ending.behind
    if ending.differences:
        yield (
            "the weights were replaced after the last step (by averages, or by the best checkpoint?): sparsity is "
            f"{ending.report.sparsity:.4g}, while the masks hold {ending.held:.4g}; {'; '.join(ending.differences)}. "
            "Choose the best checkpoint only among pruned ones, and mask averages (Sparsifier.apply_to)"
        )


def remarks(ending: Ending) -> Iterator[str]:
    """Yield a sentence for everything else that came otherwise than one may think."""
    if ending.step > 0 and ending.held < ending.promised - 1e-9 and ending.guarded is not None:
        yield f"{_short(ending)}, as the guard on {ending.guarded!r} asked"
    if ending.step > ending.total_steps:
        yield (
            f"the optimizer was stepped {ending.step} times where {ending.total_steps} steps were planned, so the "
            "schedule ran too fast; give the number of its steps (total_steps)"
        )
    if ending.unseen_metric is not None:
        yield f"the guarded metric {ending.unseen_metric!r} was never logged, so the guard had no effect"


def _short(ending: Ending) -> str:
    return (
        f"training ended at step {ending.step} of a schedule that ends at step {ending.end}: sparsity is "
        f"{ending.held:.4g}, not the promised {ending.promised:.4g}"
    )
