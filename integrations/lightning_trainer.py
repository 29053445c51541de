"""Prune inside a Lightning `Trainer`: `Trainer(callbacks=[PruningCallback("train/gradual_magnitude")])`."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prune.integrations.continued_rate import check_place, take_over_lightning
from lightning_prune.integrations.language_model import language_model
from lightning_prune.integrations.pruning_run import PruningRun
from lightning_prune.recipe import Recipe

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError('PruningCallback needs lightning: pip install "lightning_prune[lightning]"') from error

__all__ = ["PruningCallback", "total_steps"]


class PruningCallback(Callback):
    """Holds masks while a LightningModule trains, logs under `prune/`, and survives a resume.

    Args:
        recipe: a packaged name such as `train/gradual_magnitude`, a path to a YAML file, or a `Recipe`.

    Raises:
        ValueError: if the recipe cannot be used.
    """

    def __init__(self, recipe: str | Path | Recipe) -> None:
        self.run = PruningRun(recipe)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change what is trained, before the optimizers are made."""
        if stage == "fit" and self.run.recovery is not None:
            self.run.prepare(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the recipe's learning rate in the place of the module's, before a checkpoint is restored."""
        options = None if self.run.recovery is None else self.run.recovery.options.learning_rate
        if options is not None:
            take_over_lightning(trainer, options, total_steps=total_steps(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: after sharding and after a restore, on every strategy."""
        self.run.start(
            pl_module,
            trainer.optimizers,
            total_steps=total_steps(trainer),
            tokenizer=_tokenizer(trainer, pl_module),
            log=lambda metrics: _log(trainer, metrics),
            eval_batches=_eval_batches(trainer, pl_module),
        )
        for config in trainer.lr_scheduler_configs:
            check_place(config.scheduler, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what changed, and now and then the loss."""
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_logged and isinstance(outputs, dict):
            self.run.observe({"loss": outputs["loss"]})
        self.run.after_step()
        sparsity = self.run.sparsifier.report().sparsity
        self.log("prune/sparsity", sparsity, prog_bar=True, logger=False)  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass logged training metrics on."""
        self.run.observe(dict(trainer.callback_metrics))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass validation metrics on, to the guard and the report."""
        if not trainer.sanity_checking and self.run.sparsifier.is_attached:
            self.run.observe(dict(trainer.callback_metrics))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach, evaluate, report and export."""
        self.run.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach; teardown is not called after an exception."""
        self.run.abort()

    def state_dict(self) -> dict[str, Any]:
        """Return masks, statistics and schedule; every rank calls it."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold a saved state until training starts."""
        self.run.load_state_dict(state_dict)


def total_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of the whole training.

    Raises:
        ValueError: if the trainer does not know them.
    """
    steps = trainer.estimated_stepping_batches
    if isinstance(steps, float) and not steps.is_integer():
        raise ValueError("the length of this training is not known; set max_steps on the Trainer")
    return int(steps)


def _tokenizer(trainer: Trainer, module: LightningModule) -> Any:
    """Return the tokenizer of the module, of its data, or of the folder its model came from."""
    for owner in (module, getattr(trainer, "datamodule", None)):
        found = getattr(owner, "tokenizer", None)
        if found is not None:
            return found
    model: nn.Module | None = language_model(module)
    folder = getattr(model, "name_or_path", "")
    if not folder or not Path(folder).is_dir():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


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


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
