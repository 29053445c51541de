"""Prune inside a Lightning `Trainer`: `Trainer(callbacks=[PruningCallback("train/gradual_magnitude")])`."""

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_prune.integrations.models.language_model import language_model
from lightning_prune.integrations.runs.continued_rate import check_place, take_over_lightning
from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.recipe.recipe import Recipe

try:
    from lightning_prune.integrations.trainers.lightning_averages import averages
    from lightning_prune.integrations.trainers.lightning_checkpoint import (
        check_state,
        loader_warning,
        notes_on_best,
        warn_of_monitors,
    )
    from lightning_prune.integrations.trainers.lightning_package import base_class
except ImportError as error:
    raise ImportError('PruningCallback needs lightning: pip install "lightning_prune[lightning]"') from error

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback, LightningModule, Trainer = base_class("Callback"), Any, Any

__all__ = ["PruningCallback", "total_steps"]


class PruningCallback(Callback):
    """Holds masks while a LightningModule trains, logs under `prune/`, and survives a resume.

    It runs after all other callbacks except checkpoints, so that it sees what they leave of the model.

    Args:
        recipe: a packaged name such as `train/gradual_magnitude`, a path to a YAML file, or a `Recipe`.
        total_steps: steps of the optimizer that holds the targets, where the trainer cannot know them: in manual
            optimization with several optimizers, or without a length. By default the trainer's own number.

    Raises:
        ValueError: if the recipe cannot be used.
    """

    def __init__(self, recipe: str | Path | Recipe, *, total_steps: int | None = None) -> None:
        self.run = PruningRun(recipe)
        self.total_steps = total_steps
        self._is_begun = False  # whether there is something to save of this training
        self._module: Callable[[], LightningModule | None] = lambda: None
        self._sparsity: Any = 0.0
        self._renewed_at: dict[str, Any] = {}
        self._num_masked = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change what is trained, before the optimizers are made.

        Raises:
            ValueError: if there are two pruning callbacks.
        """
        if self.run.condition is not None:
            self.run.prepare(pl_module)  # also for a test: a checkpoint of a conditioned model holds its predictor
        if stage != "fit":
            return
        self._is_begun = False
        others = [callback for callback in _callbacks(trainer) if callback is not self]
        if any(isinstance(callback, PruningCallback) for callback in others):
            raise ValueError("a Trainer holds one PruningCallback; put the targets of both into one recipe")
        checkpoints = [callback for callback in others if callback in trainer.checkpoint_callbacks]
        rest = [callback for callback in others if callback not in checkpoints]
        trainer.callbacks = [*rest, self, *checkpoints]  # type: ignore[attr-defined]
        if self.run.recovery is not None:
            self.run.prepare(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change what the recipe says of learning rates, before a checkpoint is restored."""
        if self.run.condition is not None:
            self.run.condition.take_in(trainer.optimizers, [one.scheduler for one in trainer.lr_scheduler_configs])
        options = None if self.run.recovery is None else self.run.recovery.options.learning_rate
        if options is not None:
            take_over_lightning(trainer, options, total_steps=total_steps(trainer, self.total_steps))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: after sharding and after a restore, on every strategy."""
        if trainer.global_step > 0 and not self.run.sparsifier.is_restoring:
            self._go_on(trainer, pl_module)
        is_resumed = self.run.sparsifier.is_restoring
        self.run.start(
            pl_module,
            trainer.optimizers,
            total_steps=total_steps(trainer, self.total_steps),
            tokenizer=_tokenizer(trainer, pl_module),
            log=lambda metrics: _log(trainer, metrics),
            eval_batches=_eval_batches(trainer, pl_module),
            train_batches=_train_batches(trainer, pl_module),
        )
        self._is_begun, self._module = True, weakref.ref(pl_module)
        self._renewed_at, self._num_masked = dict(trainer.callback_metrics), -1
        self._sparsity = self.run.sparsifier.sparsity()
        self._mask_averages(trainer)
        warning = loader_warning(trainer) if is_resumed else None
        if warning is not None:
            self.run.sparsifier.note(warning)
        warn_of_monitors(trainer, self.run.sparsifier)
        for config in trainer.lr_scheduler_configs:
            check_place(config.scheduler, trainer.global_step)

    def _go_on(self, trainer: Trainer, module: LightningModule) -> None:
        """Go on where this callback left the same module, in a Trainer that fits it once more.

        Raises:
            ValueError: if the training is a resume from a checkpoint without pruning state.
        """
        if trainer.ckpt_path is not None:
            raise ValueError(
                f"training resumes at step {trainer.global_step} from {trainer.ckpt_path}, which holds no state of a "
                "PruningCallback: it was saved without this callback, or as weights alone. To prune from its weights "
                "on, load them into the module and fit without ckpt_path; to resume a pruning, use a checkpoint that "
                "holds its state"
            )
        if self._module() is module and not self.run.sparsifier.is_final:
            self.run.load_state_dict(self.run.state_dict())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what changed, and now and then the loss; a batch may have none."""
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if is_logged and loss is not None:
            self.run.observe({"loss": loss})
        self.run.after_step()
        has_changed = self._mask_averages(trainer)
        if has_changed or is_logged or trainer.is_last_batch:
            self._sparsity = self.run.sparsifier.sparsity()
        values = {"prune/sparsity": self._sparsity, "prune/is_final": float(self.run.sparsifier.is_final)}
        self.log("prune/sparsity", values.pop("prune/sparsity"), prog_bar=True, logger=False)  # type: ignore[attr-defined]
        self.log_dict(values, logger=False)  # type: ignore[attr-defined]

    def _mask_averages(self, trainer: Trainer) -> bool:
        """Mask the averages of the weights if masks have changed; return whether they have."""
        has_changed = self.run.sparsifier.num_updates != self._num_masked
        self._num_masked = self.run.sparsifier.num_updates
        for average in averages(trainer) if has_changed else ():
            self.run.sparsifier.apply_to(average)
        return has_changed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass logged training metrics on."""
        self._observe_renewed(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass validation metrics on, to the guard and the report."""
        if not trainer.sanity_checking and self.run.sparsifier.is_attached:
            self._observe_renewed(trainer)

    def _observe_renewed(self, trainer: Trainer) -> None:
        """Pass on the metrics that were computed since the last time; the trainer keeps the others as they were."""
        now, before = dict(trainer.callback_metrics), self._renewed_at
        self.run.observe({name: value for name, value in now.items() if value is not before.get(name)})
        self._renewed_at = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach, evaluate, report and export."""
        if not self.run.sparsifier.is_attached:
            return
        for note in notes_on_best(trainer, self.run.sparsifier):
            self.run.sparsifier.note(note, is_closing=True)
        self.run.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, after the module's own hooks have ended the training."""
        sparsifier = self.run.sparsifier
        is_ours = self._module() is pl_module and trainer.world_size == 1 and not sparsifier.broken
        found = sparsifier.verify(pl_module) if is_ours else ()
        if found:
            sparsifier.broken = (f"the weights were replaced after the training had ended: {'; '.join(found)}",)
            sparsifier.note(sparsifier.broken[0], is_closing=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach; teardown is not called after an exception."""
        self.run.abort()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach from a training that ended without its end being seen."""
        if stage == "fit" and self.run.sparsifier.is_attached:
            self.run.abort()

    def state_dict(self) -> dict[str, Any]:
        """Return masks, statistics and schedule; every rank calls it. Nothing, before a training has begun."""
        return self.run.state_dict() if self._is_begun or self.run.sparsifier.is_restoring else {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write into the state to which step it belongs."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            state["global_step"] = checkpoint["global_step"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Hold a saved state until training starts; testing with a checkpoint changes nothing here.

        Raises:
            ValueError: if the state is damaged or belongs to another step or recipe.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state and trainer.state.fn == "fit":
            check_state(state, checkpoint)
            self.run.load_state_dict(state)


def total_steps(trainer: Trainer, given: int | None = None) -> int:
    """Return the optimizer steps of the whole training.

    Raises:
        ValueError: if the trainer does not know them.
    """
    if given is not None:
        return given
    optimizers, is_manual = trainer.optimizers, not trainer.lightning_module.automatic_optimization
    if is_manual and len(optimizers) > 1 and trainer.max_steps != -1:
        raise ValueError(
            f"max_steps counts the steps of all {len(optimizers)} optimizers together, the schedule those of the one "
            "that holds the targets; give its number: PruningCallback(recipe, total_steps=...)"
        )
    steps = trainer.estimated_stepping_batches
    if steps < 0 or (isinstance(steps, float) and not steps.is_integer()):
        raise ValueError(
            "the length of this training is not known; set max_steps on the Trainer, or give total_steps to the "
            "PruningCallback"
        )
    return int(steps)


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _tokenizer(trainer: Trainer, module: LightningModule) -> Any:
    """Return the tokenizer of the module, of its data, or of the folder its model came from."""
    for owner in (module, getattr(trainer, "datamodule", None)):
        found = getattr(owner, "tokenizer", None)
        if found is not None:
            return found
    model: nn.Module | None = language_model(module)
    folder = getattr(model, "name_or_path", "")
    if not folder or not (Path(folder) / "config.json").is_file():
        return None
    from lightning_prune.integrations.models.hf_open import open_tokenizer

    return open_tokenizer(folder)


def _eval_batches(trainer: Trainer, module: LightningModule) -> Callable[[], Iterator[Any]] | None:
    """Return what gives the validation batches anew; of several loaders, those of the first.

    The loader is made anew or copied, since one that can be resumed remembers where its last reader stopped.
    """
    if not trainer.val_dataloaders:
        return None
    source = trainer.fit_loop.epoch_loop.val_loop._data_source

    def batches() -> Iterator[Any]:
        loaders = source.dataloader()
        loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        for batch in copy.copy(loader) if hasattr(loader, "state_dict") else loader:
            yield module.transfer_batch_to_device(batch, module.device, 0)

    return batches


def _train_batches(trainer: Trainer, module: LightningModule) -> Callable[[], Iterator[Any]]:
    """Return what gives the training batches anew, and leaves the trainer's own reader where it stands."""

    def batches() -> Iterator[Any]:
        loader = trainer.fit_loop._data_source.dataloader()
        for batch in copy.copy(loader) if hasattr(loader, "state_dict") else loader:
            yield module.transfer_batch_to_device(batch, module.device, 0)

    return batches


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
