"""List what a recipe would prune of a Hugging Face model, and what it leaves out, without pruning anything."""

from lightning_prune.conductor.fitting import fit_targets
from lightning_prune.conductor.start_line import start_line, summary
from lightning_prune.integrations.models.hf_open import open_model
from lightning_prune.recipe.recipe import Recipe

__all__ = ["inspect_targets"]

Table = list[tuple[str, ...]]


def inspect_targets(
    recipe: Recipe, name: str, *, total_steps: int | None = None, trust_remote_code: bool = False
) -> tuple[list[Table], str]:
    """Return two tables, of the targets and of what is left out and why, and a sentence that sums them up.

    Args:
        recipe: with a section `prune`, or one that recovers.
        name: a model folder or a hub id.
        total_steps: optimizer steps of the training; that of the recipe's `trainer` section if left out.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Raises:
        ValueError: if the recipe prunes nothing, or not this model, or not within these steps; if the model cannot be
            opened.
    """
    prune = recipe.masking()
    model = open_model(name, trust_remote_code=trust_remote_code)
    selection = fit_targets(model, prune.targets, prune.scorer, prune.granularity)
    targets: Table = [("target", "shape", "read as", "out x in")]
    for binding in selection.targets:
        rows, columns = binding.shape_OI
        targets.append((binding.name, _shape(binding.parameter.shape), binding.layout.title, f"{rows} x {columns}"))
    left_out: Table = [("left out", "shape", "why")]
    left_out += [(one.name, _shape(one.shape), one.reason) for one in selection.left_out]
    steps = (recipe.trainer or {}).get("max_steps") if total_steps is None else total_steps
    if isinstance(steps, int) and steps > 0:
        return [targets, left_out], start_line(model, selection, prune.schedule, steps)
    return [targets, left_out], summary(model, selection)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
