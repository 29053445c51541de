"""What a guard does to a run when its metric comes in."""

from lightning_prune.conductor.guard import MetricGuard
from lightning_prune.conductor.held_masks import HeldMasks
from lightning_prune.conductor.progress import Progress

__all__ = ["take_in"]


def take_in(guard: MetricGuard, value: float, progress: Progress, held: HeldMasks) -> tuple[str | None, bool]:
    """Take in a value of the guarded metric, the same on every rank.

    Returns:
        what there is to say, and whether earlier masks were put in force.
    """
    memory = progress.memory
    change = memory.judge(guard, value)
    if not memory.is_held and guard.action == "rollback":
        memory.remember(held.parameters, held.masks, progress.sparsity)
    where = f"step {progress.step}: {guard.metric} = {value:.6g}"
    if change == "released":
        return f"{where} is within bounds again; pruning goes on", False
    if change is None:
        return None, False
    good, now = memory.good, progress.sparsity
    if guard.action == "hold" or good is None or now <= good.sparsity:
        return f"{where} crossed its bound; pruning holds at sparsity {now:.4g}", False
    held.go_back(good)
    progress.sparsity = good.sparsity
    what = f"goes back from sparsity {now:.4g} to the masks of {good.sparsity:.4g}"
    return f"{where} crossed its bound; pruning {what}", True
