"""What is said aloud when a training ends and not everything came as promised."""

from collections.abc import Iterator

from lightning_prune.types import Report

__all__ = ["closing_notes"]


def closing_notes(
    report: Report, step: int, end: int, held: float, promised: float, *, num_pruned: int, unseen_metric: str | None
) -> Iterator[str]:
    """Yield one sentence for each promise that was not kept.

    Args:
        report: of the weights as they are.
        step: optimizer steps taken.
        end: the step at which the schedule ends.
        held: the sparsity of the masks.
        promised: the sparsity asked for.
        num_pruned: the weights that the masks prune; 0 if they cannot be counted.
        unseen_metric: what the guard waited for in vain.
    """
    if held < promised - 1e-9:
        yield (
            f"training ended at step {step} of a schedule that ends at step {end}: sparsity is "
            f"{held:.4g}, not the promised {promised:.4g}"
        )
    if report.num_target_zeros < num_pruned:
        yield (
            "the weights were replaced after the last step (by the best checkpoint?): sparsity is "
            f"{report.sparsity:.4g}, while the masks hold {held:.4g}"
        )
    if unseen_metric is not None:
        yield f"the guarded metric {unseen_metric!r} was never logged, so the guard had no effect"
