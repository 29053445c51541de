"""Prune inside a Hugging Face `Trainer`: `Trainer(..., callbacks=[PruningCallback("train/gradual_magnitude")])`.

Transformers keeps the state of callbacks as JSON of one rank, so masks and statistics go into a side file in the
checkpoint folder; `trainer_state.json` holds its digest.
"""

import inspect
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune import distributed
from lightning_prune.integrations.continued_rate import check_place, take_over_transformers
from lightning_prune.integrations.pruning_run import PruningRun
from lightning_prune.recipe import Recipe
from lightning_prune.saved_state import load_file

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError('PruningCallback needs transformers: pip install "lightning_prune[hf]"') from error

__all__ = ["SIDE_FILE", "PruningCallback", "calling_trainer"]

SIDE_FILE = "lightning_prune.pt"
logger = logging.getLogger(__name__)


class PruningCallback(TrainerCallback, ExportableState):
    """Holds masks while a Trainer trains, logs under `prune/`, and survives a resume.

    Args:
        recipe: a packaged name such as `train/gradual_magnitude`, a path to a YAML file, a `Recipe`, or its sections.

    Raises:
        ValueError: if the recipe cannot be used.
    """

    def __init__(self, recipe: "str | Path | Recipe | dict[str, Any]") -> None:
        self.run = PruningRun(recipe)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set half-written checkpoints aside, so that a resume takes the last whole one; change what is trained."""
        if args.process_index == 0 and args.output_dir is not None:
            _set_aside_half_written(Path(args.output_dir))
        if self.run.recovery is not None:
            trainer, _ = calling_trainer()
            model = self.run.prepare(trainer.model)
            trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
            if self.run.recovery.options.learning_rate is not None:
                take_over_transformers(trainer, self.run.recovery.options.learning_rate)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the checkpoint holds, and attach."""
        trainer, resumed_from = calling_trainer()
        if state.global_step > 0:
            folder = Path(resumed_from or _checkpoint_folder(args, state))
            self.run.load_state_dict(_read_side_file(folder, state.global_step))
        self.run.start(
            kwargs["model"],
            [kwargs["optimizer"]],
            total_steps=state.max_steps,
            tokenizer=kwargs.get("processing_class"),
            log=lambda metrics: _log(trainer, metrics),
            eval_batches=None if trainer.eval_dataset is None else lambda: _eval_batches(trainer),
            takes_loss=lambda loss: _take_loss(trainer, loss),
        )
        check_place(kwargs.get("lr_scheduler"), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what changed; when a checkpoint is about to be written, write the side file first."""
        self.run.after_step()
        self._save_if_due(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """When a checkpoint is about to be written, write the side file first."""
        self._save_if_due(args, state, control)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Pass logged metrics on, to the guard and the report; a checkpoint of this step must hold what they change."""
        is_ours = all(name.startswith("prune/") or name == "epoch" for name in logs or ())
        if logs and self.run.sparsifier.is_attached and not is_ours:
            self.run.observe(logs)
            self._save_if_due(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the side file of a checkpoint that was decided on only after an evaluation."""
        folder = _checkpoint_folder(args, state)
        is_missing = distributed.broadcast_number(float(not (folder / SIDE_FILE).exists()), args.device)
        if is_missing:
            self._write_side_file(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach, evaluate, report and export."""
        self.run.finish()
        if self.run.recovery is not None and self.run.recovery.options.distill is not None:
            calling_trainer()[0].compute_loss_func = None

    def state(self) -> dict[str, Any]:
        """Return what builds this callback again; masks are in the side file."""
        return {"args": {"recipe": self.run.recipe.as_dict()}, "attributes": {}}

    def _save_if_due(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if control.should_save:
            self._write_side_file(args, state)

    def _write_side_file(self, args: TrainingArguments, state: TrainerState) -> None:
        saved = {"global_step": state.global_step, "run": self.run.state_dict()}
        if not args.should_save:
            return
        folder = _checkpoint_folder(args, state)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{SIDE_FILE}.partial"
        torch.save(saved, partial)
        os.replace(partial, folder / SIDE_FILE)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _read_side_file(folder: Path, global_step: int) -> dict[str, Any]:
    path = folder / SIDE_FILE
    if not path.exists():
        raise ValueError(
            f"training resumes at step {global_step} from {folder}, which holds no {SIDE_FILE}: it was saved without "
            "this callback, or the file was lost. To prune from its weights on, load them as the model of a new "
            "training; to resume a pruning, use a checkpoint that holds the file"
        )
    saved = load_file(str(path))
    if saved.get("global_step") != global_step:
        raise ValueError(
            f"{path} belongs to step {saved.get('global_step')}, the checkpoint to step {global_step}; they were mixed "
            "up: use an untouched checkpoint"
        )
    run: dict[str, Any] = saved["run"]
    return run


def calling_trainer() -> "tuple[Trainer, str | os.PathLike[str] | None]":
    """Return the Trainer whose event this is, and the folder it resumes from.

    Transformers tells a callback neither; both stand in the frames of the training loop that is calling.
    """
    trainer, folder = None, None
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            trainer = frame.f_locals["self"]
            folder = frame.f_locals.get("resume_from_checkpoint") or folder
        frame = frame.f_back
    if trainer is None:
        raise RuntimeError("PruningCallback must be called by a transformers.Trainer")
    return trainer, folder if isinstance(folder, str | os.PathLike) else None


def _take_loss(trainer: Trainer, loss: Any) -> None:
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "recover.distill gives the loss, and so does the compute_loss_func of this Trainer; leave out one of them"
        )
    trainer.compute_loss_func = loss


def _eval_batches(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    """Yield the evaluation batches as the model takes them; of several evaluation sets, those of the first."""
    dataset = trainer.eval_dataset
    first = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    for batch in trainer.get_eval_dataloader(first):
        yield dict(batch)


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log through the Trainer without ending the log, evaluation or save that is due at this step.

    A subclass that adds its own averages to every log, as TRL's do, is passed by: they belong to its own lines.
    """
    control = trainer.control
    due = control.should_log, control.should_evaluate, control.should_save
    Trainer.log(trainer, metrics)
    trainer.control.should_log, trainer.control.should_evaluate, trainer.control.should_save = due


def _is_whole(folder: Path) -> bool:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if "PruningCallback" in state.get("stateful_callbacks", {}):
            load_file(str(folder / SIDE_FILE))
    except (OSError, ValueError):
        return False
    return True


def _set_aside_half_written(output_dir: Path) -> None:
    """Rename the newest checkpoints that a killed process left half-written."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if _is_whole(folder):
            return
        aside = folder.with_name(f"half-written-{folder.name}")
        number = 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"half-written-{number}-{folder.name}")
        folder.rename(aside)
        logger.warning("%s is half-written: the process ended while saving it; renamed to %s", folder, aside.name)
