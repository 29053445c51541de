"""Checkpoints of a Lightning training that is pruned: only pruned ones are kept as the best, and what is kept is said.

Early in a training less is pruned and the loss is lower, so the best checkpoint by a loss is as a rule a dense one.
"""

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from lightning_prune.base import distributed
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.integrations.runs.pruning_run import PruningRun
from lightning_prune.integrations.trainers.lightning_package import base_class

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
else:
    ModelCheckpoint = base_class("ModelCheckpoint")

__all__ = ["PrunedCheckpoint", "check_state", "loader_warning", "notes_on_best", "warn_of_monitors"]

logger = logging.getLogger(__name__)
_STATE = {"sparsifier", "evaluations"}


class PrunedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that saves only models of the final sparsity; it takes the same arguments.

    It stands beside a `PruningCallback`; `best_model_path` is empty as long as the final sparsity is not reached.
    """

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Check that there is a pruning to wait for.

        Raises:
            ValueError: if there is none.
        """
        if stage == "fit" and not _sparsifiers(trainer):
            raise ValueError("PrunedCheckpoint waits for the masks of a PruningCallback; add one to this Trainer")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: "Trainer", *args: Any, **kwargs: Any) -> None:
        """Save if it is time and the model is pruned."""
        if _is_final(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: "Trainer", *args: Any, **kwargs: Any) -> None:
        """Save if it is time and the model is pruned."""
        if _is_final(trainer):
            super().on_train_epoch_end(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: "Trainer", *args: Any, **kwargs: Any) -> None:
        """Save if it is time and the model is pruned."""
        if _is_final(trainer):
            super().on_validation_end(trainer, *args, **kwargs)

    def on_train_end(self, trainer: "Trainer", *args: Any, **kwargs: Any) -> None:
        """Save what the end of a training saves, if the model is pruned."""
        if _is_final(trainer):
            super().on_train_end(trainer, *args, **kwargs)


def _sparsifiers(trainer: "Trainer") -> list[Sparsifier]:
    runs = [getattr(callback, "run", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [run.sparsifier for run in runs if isinstance(run, PruningRun)]


def _is_final(trainer: "Trainer") -> bool:
    return all(sparsifier.is_final for sparsifier in _sparsifiers(trainer))


def _monitoring(trainer: "Trainer") -> Iterator[Any]:
    """Yield the checkpoint callbacks that keep the best by a metric, pruned or not."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) is not None and not isinstance(callback, PrunedCheckpoint):
            yield callback


def warn_of_monitors(trainer: "Trainer", sparsifier: Sparsifier) -> None:
    """Say at the start which checkpoints may be kept from before the pruning."""
    for callback in () if sparsifier.is_final else _monitoring(trainer):
        distributed.log(
            logger,
            logging.WARNING,
            "ModelCheckpoint keeps the best by %r: as a rule a model from before the last masks, while save_top_k "
            "deletes the pruned ones. Use PrunedCheckpoint from lightning_prune.integrations.lightning_checkpoint in "
            "its place, which keeps the best of the pruned ones, or look at the metric prune/is_final",
            callback.monitor,
        )


def notes_on_best(trainer: "Trainer", sparsifier: Sparsifier) -> Iterator[str]:
    """Yield a sentence for each best checkpoint that is not what the masks promise; collective when sharded."""
    for callback in _monitoring(trainer):
        path = getattr(callback, "best_model_path", "")
        if not os.path.isfile(path):  # a folder is sharded, another file system is not looked at
            continue
        try:
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            yield f"the best checkpoint {path} could not be compared with the masks: {type(error).__name__}"
            continue
        found = sparsifier.verify(saved.get("state_dict", {}))
        if found:
            yield (
                f"the best checkpoint by {callback.monitor!r}, {path}, is not the pruned model: {'; '.join(found)}. "
                "Use the model as it is, or PrunedCheckpoint in place of ModelCheckpoint"
            )


def check_state(state: Any, checkpoint: Any) -> None:
    """Check that a callback's state is whole and belongs to its checkpoint.

    Raises:
        ValueError: if it does not.
    """
    missing = _STATE - set(state)
    if missing:
        raise ValueError(
            f"the pruning state of this checkpoint lacks {sorted(missing)}; it is damaged, use an earlier checkpoint"
        )
    step, own = checkpoint["global_step"], state.get("global_step")
    if own is not None and own != step:
        raise ValueError(
            f"the pruning state belongs to step {own}, the checkpoint to step {step}; they were mixed up: use an "
            "untouched checkpoint"
        )


def loader_warning(trainer: "Trainer") -> str | None:
    """Return what to say of a resume inside an epoch whose loaders start the epoch from its first batch."""
    seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    loaders = tree_leaves(trainer.train_dataloader)
    can_go_on = all(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders)
    if not 0 < seen < trainer.num_training_batches or can_go_on:
        return None
    return (
        f"training resumes after batch {seen} of {trainer.num_training_batches} of an epoch, and its data loader "
        "starts the epoch from the first batch: other batches than without the pause, so the resume is not exact. Save "
        "at the end of epochs, or give a loader with state_dict and load_state_dict (torchdata's StatefulDataLoader)"
    )
