"""What several pruning runs in one training must keep apart."""

from collections.abc import Sequence
from itertools import combinations

from torch import nn

from lightning_prune.integrations.runs.pruning_run import PruningRun

__all__ = ["check_beside", "check_targets_apart"]


def check_beside(run: PruningRun, others: Sequence[PruningRun]) -> None:
    """Check, before the model is known, that a run can stand beside others in one training.

    Raises:
        ValueError: if two of them change what is trained, condition the model, or write into one folder.
    """
    if not others:
        return
    if run.recovery is not None or any(other.recovery is not None for other in others):
        raise ValueError(
            "a recipe with a section recover changes what is trained, so it stands alone in a Trainer; leave out the "
            "other pruning callbacks, or put their targets into its section prune"
        )
    if sum(each.condition is not None for each in (run, *others)) > 1:
        raise ValueError("two recipes of this Trainer have a section condition, and a model has one; leave one out")
    for name, folders in (
        ("export.dir", [each.export.folder for each in (run, *others)]),
        ("report.dir", [each.recipe.report.dir for each in (run, *others)]),
    ):
        if folders[0] is not None and folders[0] in folders[1:]:
            raise ValueError(f"two pruning callbacks write into {name}: {folders[0]}; give each a folder of its own")


def check_targets_apart(runs: Sequence[PruningRun], model: nn.Module) -> None:
    """Check that no two runs prune the same weight of a model.

    Raises:
        ValueError: naming the first that two of them prune.
    """
    if len(runs) < 2:
        return
    resolved = [{binding.name for binding in run.sparsifier.targets.resolve(model)} for run in runs]
    for one, other in combinations(resolved, 2):
        shared = sorted(one & other)
        if shared:
            raise ValueError(
                f"two pruning callbacks of this Trainer prune {shared[0]} ({len(shared)} targets in all), and a weight "
                "has one mask: give prune.targets.include and exclude so that they do not meet, or use one recipe"
            )
