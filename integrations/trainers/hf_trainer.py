"""Prune inside a Hugging Face `Trainer`: `Trainer(..., callbacks=[PruningCallback("train/gradual_magnitude")])`.

Transformers keeps the state of callbacks as JSON of one rank, so masks and statistics go into a side file in the
checkpoint folder, see `hf_checkpoints`; `trainer_state.json` holds its digest.
"""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_prune.base import distributed
from lightning_prune.calibration.hooks import unwrap_optimizer
from lightning_prune.integrations.runs.continued_rate import check_place, take_over_transformers
from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.integrations.runs.several_runs import check_beside, check_targets_apart
from lightning_prune.integrations.trainers.hf_checkpoints import (
    SIDE_FILE,
    has_optimizer,
    read_side_file,
    write_side_file,
)
from lightning_prune.recipe.recipe import Recipe

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState

    from lightning_prune.integrations.trainers.hf_train_call import watch
except ImportError as error:
    raise ImportError('PruningCallback needs transformers: pip install "lightning_prune[hf]"') from error

__all__ = ["SIDE_FILE", "PruningCallback", "calling_trainer"]

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
        self.saved_as, self.saved_digest = SIDE_FILE, ""
        self._saved: dict[str, Any] = {}  # what a checkpoint of the step is to hold
        self._written_at = -1  # the step whose checkpoint holds it
        self._saved_at = 0  # the step of the last checkpoint, also one of an earlier process
        self._clock_at: int | None = None  # until a step was seen: where the clock stood

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Watch over the trainings of this Trainer; change what is trained."""
        trainer, _ = calling_trainer()
        watch(trainer, _let_go, _check_again)
        check_beside(self.run, [other.run for other in _callbacks(trainer) if other is not self])
        if self.run.condition is not None:
            self.run.condition.watch_transformers(trainer)
        if self.run.recovery is not None or self.run.condition is not None:
            assert trainer.model is not None
            model = self.run.prepare(trainer.model)
            trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
            _recompute_with_gradients(trainer)
        if self.run.recovery is not None and self.run.recovery.options.learning_rate is not None:
            take_over_transformers(trainer, self.run.recovery.options.learning_rate)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the checkpoint holds, and attach."""
        trainer, resumed_from = calling_trainer()
        watch(trainer, _let_go, _check_again)
        if self.run.sparsifier.is_attached:  # to a training that died inside `train`, which starts again in there
            self.run.abort()
        callbacks = _callbacks(trainer)
        check_beside(self.run, [other.run for other in callbacks if other is not self])
        check_targets_apart([callback.run for callback in callbacks], kwargs["model"])
        self.saved_as = SIDE_FILE if len(callbacks) == 1 else f"{Path(SIDE_FILE).stem}-{self._key()}.pt"
        self._saved, self._written_at, self._saved_at = {}, -1, state.global_step
        if state.global_step > 0:
            folder = Path(resumed_from or _checkpoint_folder(trainer))
            self.run.load_state_dict(read_side_file(folder, self.saved_as, state.global_step))
            if not has_optimizer(folder):
                logger.warning(
                    "%s holds no optimizer state (save_only_model?): training goes on with a new one, which is not "
                    "the training without a pause",
                    folder,
                )
        self.run.start(
            kwargs["model"],
            [kwargs["optimizer"]],
            total_steps=state.max_steps,
            tokenizer=kwargs.get("processing_class"),
            log=lambda metrics: _log(trainer, metrics),
            eval_batches=None if trainer.eval_dataset is None else lambda: _eval_batches(trainer),
            train_batches=lambda: map(dict, trainer.get_train_dataloader()),
            takes_loss=lambda loss: _take_loss(trainer, loss),
            saves_whole=False,
            spare=args.output_dir,
        )
        check_place(kwargs.get("lr_scheduler"), state.global_step)
        self._clock_at = self.run.sparsifier.step
        self._announce_best(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what changed; when a checkpoint is about to be written, collect what it must hold."""
        if self._clock_at is not None:
            self._check_clock(kwargs["optimizer"])
        self.run.after_step()
        self._collect_if(control.should_save, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """When a checkpoint is about to be written, collect what it must hold."""
        self._collect_if(control.should_save, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Pass logged metrics on, to the guard and the report; a checkpoint of this step must hold what they change."""
        is_ours = all(name.startswith("prune/") or name == "epoch" for name in logs or ())
        if logs and self.run.sparsifier.is_attached and not is_ours:
            self.run.observe(logs)
            self._collect_if(control.should_save, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let checkpoints from before the last change of masks no longer count as the best."""
        if not self.run.sparsifier.is_attached:
            return
        since, best_at = self.run.final_since(), state.best_global_step
        if best_at is None and args.save_strategy == "best":  # Transformers 4 leaves it out
            best_at = self._saved_at
        if since is not None and best_at is not None and best_at < since:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self._collect_if(args.save_strategy == "best", state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the side file of a checkpoint that nobody announced."""
        self._saved_at = state.global_step
        if not self.run.sparsifier.is_attached:
            return
        is_missing = distributed.broadcast_number(float(self._written_at != state.global_step), args.device)
        if is_missing:
            self._collect_if(True, state)
            self._write(args, state, _checkpoint_folder(calling_trainer()[0]))
        self._saved = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach, evaluate, report and export."""
        self.run.finish()

    def state(self) -> dict[str, Any]:
        """Return what builds this callback again; inside a save, write the side file first.

        Transformers asks for it after it has written the model and before it writes `trainer_state.json`.
        """
        found = _saving_trainer()
        attributes = {}
        if found is not None and self.run.sparsifier.is_attached:
            is_collected = self._saved.get("global_step") == found.state.global_step
            if not distributed.is_active():  # else all ranks must collect together, and `on_save` does it
                self._collect_if(not is_collected, found.state)
            self._write(found.args, found.state, _checkpoint_folder(found))
            if self._written_at == found.state.global_step:
                attributes = {"saved_as": self.saved_as, "saved_digest": self.saved_digest}
        return {"args": {"recipe": self.run.recipe.as_dict()}, "attributes": attributes}

    def _collect_if(self, is_due: bool, state: TrainerState) -> None:
        if is_due:
            self._saved = {"global_step": state.global_step, "run": self.run.state_dict()}

    def _write(self, args: TrainingArguments, state: TrainerState, folder: Path) -> None:
        if self._saved.get("global_step") == state.global_step and args.should_save:
            write_side_file(folder, self.saved_as, **self._saved)
            self.saved_digest = str(self._saved["run"]["sparsifier"]["digest"])
            self._written_at = state.global_step

    def _key(self) -> str:
        """Return what tells this callback's side file from those of others: its targets, which do not meet theirs."""
        targets = json.dumps(self.run.sparsifier.settings()["targets"], sort_keys=True, default=str)
        return hashlib.sha256(targets.encode()).hexdigest()[:8]

    def _check_clock(self, optimizer: Any) -> None:
        """Refuse, at the first step that was not skipped, an optimizer whose steps torch does not see."""
        has_stepped = self.run.sparsifier.step != self._clock_at
        scaler = getattr(optimizer, "scaler", None)
        if not has_stepped and scaler is None and not getattr(optimizer, "step_was_skipped", False):
            inner = unwrap_optimizer(optimizer)
            raise ValueError(
                f"the Trainer took a step, but the step of {type(inner).__name__} was never called: an optimizer that "
                "changes the weights in the backward pass (LOMO) cannot be pruned under; set optim to adamw_torch"
            )
        if has_stepped:
            self._clock_at = None

    def _announce_best(self, args: TrainingArguments) -> None:
        is_monitored = args.load_best_model_at_end or args.save_strategy == "best" or args.metric_for_best_model
        if is_monitored and self.run.sparsifier.step < self.run.last_step:
            logger.warning(
                "the best checkpoint by %s would be one that is hardly pruned, and save_total_limit would delete those "
                "that are; so what was saved before step %d, the last of this schedule, no longer counts as the best "
                "once a later one is evaluated. Evaluate and save after it, or train without load_best_model_at_end",
                args.metric_for_best_model,
                self.run.last_step,
            )


def _callbacks(trainer: Trainer) -> list[PruningCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, PruningCallback)]


def _recompute_with_gradients(trainer: Trainer) -> None:
    """Recompute activations so that gradients pass above frozen embeddings, which re-entry does not.

    Where nothing is said, Transformers 4 re-enters and Transformers 5 does not.

    Raises:
        ValueError: if the arguments of the training ask for re-entry.
    """
    args: Any = trainer.args
    model: Any = trainer.model
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    is_open = any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    if is_open or not getattr(args, name) or hasattr(model, "_require_grads_hook"):
        return
    how = dict(getattr(args, f"{name}_kwargs") or {})
    if how.get("use_reentrant"):
        raise ValueError(
            f"{name}_kwargs {how} gives no gradient to what is trained here, since the embeddings below it are "
            "frozen; set use_reentrant to False, or call model.enable_input_require_grads() before the Trainer is made"
        )
    setattr(args, f"{name}_kwargs", how | {"use_reentrant": False})


def _let_go(trainer: Trainer) -> None:
    """Take everything of this library off a Trainer whose training has died."""
    for callback in _callbacks(trainer):
        callback.run.abort()


def _check_again(trainer: Trainer) -> None:
    """Look at the model once more: callbacks of the program may have changed it after ours."""
    for callback in _callbacks(trainer):
        if not callback.run.sparsifier.is_attached:
            callback.run.check_again(trainer.callback_handler.model)


def _checkpoint_folder(trainer: Trainer) -> Path:
    """Return where this step's checkpoint lies: trials of a search have folders of their own."""
    return Path(trainer._get_output_dir(getattr(trainer, "_trial", None))) / f"checkpoint-{trainer.state.global_step}"


def _saving_trainer() -> Trainer | None:
    """Return the Trainer that is writing a checkpoint and has called this; None outside a save."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is Trainer._save_checkpoint.__code__:
            found: Trainer = frame.f_locals["self"]
            return found
        frame = frame.f_back
    return None


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


def _take_loss(trainer: Trainer, loss: Any) -> float:
    """Give the Trainer a loss, or None for its own; return its label smoothing, which that loss must do itself."""
    if loss is not None and trainer.compute_loss_func is not None:
        raise ValueError(
            "recover.distill gives the loss, and so does the compute_loss_func of this Trainer; leave out one of them"
        )
    trainer.compute_loss_func = loss
    return trainer.args.label_smoothing_factor


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
