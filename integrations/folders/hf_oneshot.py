"""Open a Hugging Face model, prune it once from calibration text, and write it again as the class it was.

Shapes: N sequences, T tokens of each.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from lightning_prune.base.types import Report
from lightning_prune.export.dense import export_dense
from lightning_prune.export.folder import NOTE_NAME, PLAN_NAME, check_free, check_writable, read_note
from lightning_prune.export.huggingface import export_huggingface
from lightning_prune.export.plan_note import read_plan
from lightning_prune.integrations.models.hf_open import load_model
from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.integrations.text.calibration_text import Text
from lightning_prune.integrations.text.hf_calibration import check_text_fits
from lightning_prune.recipe.recipe import Export, Recipe
from lightning_prune.report.counts import measure
from lightning_prune.targets.targets import Targets

__all__ = [
    "export_model",
    "load_model",
    "run_oneshot",
]

logger = logging.getLogger(__name__)


def run_oneshot(
    config: str,
    *,
    model: str,
    out: str,
    overrides: Sequence[str] = (),
    data: str | None = None,
    num_sequences: int = 128,
    sequence_length: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Report:
    """Prune a model once and write it, with a report if the recipe names a folder for that.

    Args:
        config: a packaged recipe name or a path.
        model: a model folder or a hub id.
        out: a folder that does not exist yet or is empty.
        overrides: `section.key=value` for the recipe.
        data: calibration text, see `calibration_text.Text`; text that the model writes itself if left out.
        num_sequences: calibration sequences.
        sequence_length: tokens per sequence; the longest the model reads, 2048 at most, if left out.
        batch_size: sequences that go through the model together.
        device: a torch device, or `auto` for an accelerator if there is one.
        trust_remote_code: whether to run the modelling file that lies in the model's folder.

    Raises:
        ValueError: if an input is wrong; nothing has been written then.
    """
    recipe = Recipe.load(config, overrides=overrides)
    _check_condition(recipe)
    _check_folders(out, recipe.report.dir)
    form = "huggingface" if recipe.export is None else recipe.export.format
    run = PruningRun(dataclasses.replace(recipe, export=Export(format=form, dir=out)))
    needs_text = _needs_text(run)
    text = Text(
        data=data, num_sequences=num_sequences, sequence_length=sequence_length, batch_size=batch_size, seed=recipe.seed
    )
    documents = text.read()
    parent = _parent(recipe, device=device, trust_remote_code=trust_remote_code)
    network, tokenizer = load_model(model, device=device, trust_remote_code=trust_remote_code)
    if needs_text:
        check_text_fits(network, "recover.reconstruct" if recipe.prune is None else recipe.prune.scorer)
    passages = text.passages(network, tokenizer, documents, needed=needs_text)
    before = passages.loss(network, title="loss before")
    report = run.prune_once(network, passages.calibration, tokenizer=tokenizer, parent=parent)
    passages.tell(before, passages.loss(network, title="loss after"))
    logger.info("sparsity %.4f of %d targets; written to %s", report.sparsity, len(report.targets), out)
    return report


def _check_condition(recipe: Recipe) -> None:
    if recipe.condition is not None:
        raise ValueError(
            f"recipe {recipe.name} trains what it adds to the model, and oneshot trains nothing; use "
            "lightning-prune run or exec, or the recipe instruction/tasks"
        )


def _check_folders(out: str, report: str | None) -> None:
    """Refuse folders that cannot be written, before anything is opened."""
    folder = check_free(out)
    check_writable(folder if folder.is_dir() else folder.parent)
    if report is not None:
        check_writable(report)


def _needs_text(run: PruningRun) -> bool:
    """Return whether calibration text is read.

    Raises:
        ValueError: if the recipe needs a training.
    """
    if run.recovery is not None:
        run.recovery.check_once()
        return True
    return bool(run.recipe.masking().scorer.needs)


def _parent(recipe: Recipe, *, device: str, trust_remote_code: bool) -> PreTrainedModel | None:
    """Open the dense model that a pruned one is refitted to.

    Raises:
        ValueError: if it is missing, or has no effect.
    """
    refit = None if recipe.recover is None else recipe.recover.reconstruct
    if refit is None:
        return None
    if (refit.parent is None) == (recipe.prune is None):
        if refit.parent is None:
            raise ValueError(
                "recover.reconstruct refits a model that comes pruned to the dense one; set "
                "recover.reconstruct.parent to its folder, or add a section prune and give the dense model"
            )
        raise ValueError(
            "recover.reconstruct.parent has no effect where the recipe prunes the dense model itself; leave it out"
        )
    return (
        None
        if refit.parent is None
        else load_model(refit.parent, device=device, trust_remote_code=trust_remote_code)[0]
    )


def export_model(name: str, out: str, *, form: str, trust_remote_code: bool = False) -> Path:
    """Write a model folder in another form; its `sparsity.json`, if it has one, says what the targets were.

    Args:
        name: a model folder or a hub id, for example a checkpoint of a training run.
        out: a folder that does not exist yet or is empty.
        form: `dense` or `huggingface`.
        trust_remote_code: whether to run a modelling file that comes with the model.

    Returns:
        What was written.

    Raises:
        ValueError: if the model cannot be opened, a note beside it is damaged, or the folder is not empty.
    """
    check_free(out)
    folder = Path(name).expanduser()
    note = read_note(folder)
    plan_note = read_plan(folder)[1] if (folder / PLAN_NAME).is_file() else None
    model, tokenizer = load_model(name, device="cpu", trust_remote_code=trust_remote_code)
    try:
        targets = Targets(include=tuple(note.get("targets", ()))).resolve(model)
    except ValueError as error:
        if not note:
            raise
        raise ValueError(f"{folder / NOTE_NAME} is not of this model: {error}") from error
    report = measure(model, targets, step=0)
    if form == "dense":
        return export_dense(model, out, report=report, recipe=note.get("recipe"))
    return export_huggingface(
        model, out, tokenizer=tokenizer, report=report, recipe=note.get("recipe"), plan_note=plan_note
    )
