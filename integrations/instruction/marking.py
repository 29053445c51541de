"""Mark, where batches are made, which tokens are the instruction.

Trainers that smooth labels or bring a loss of their own take the labels out of the batch before the model is called;
the mark stays in it. Trainers also count the labels of a batch to divide the loss by them, so the labels of a chunk
that is read go out here.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.predictors.prompt import Reads

__all__ = ["MarkingCollator", "mark_calls"]


class MarkingCollator:
    """A collator that adds `instruction_mask` (B, T) to what another one makes.

    Args:
        collator: the training program's own.
        reads: where the instruction stands.
    """

    def __init__(self, collator: Callable[[Any], Any], reads: Reads) -> None:
        self.collator, self.reads = collator, reads

    def __call__(self, features: Any) -> Any:
        """Return the batch, marked where it holds labels."""
        batch = self.collator(features)
        _mark(batch, self.reads)
        return batch


def mark_calls(model: nn.Module, reads: Reads) -> RemovableHandle:
    """Mark the training calls of a model before its other hooks see them, as a distillation's, which takes labels out.

    Args:
        model: that is called with labels; a call that is marked already is left as it is.
        reads: where the instruction stands.
    """
    names = list(inspect.signature(model.forward).parameters)

    def mark(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if module is not model or not torch.is_grad_enabled() or "instruction_mask" in kwargs:
            return None
        batch = {**dict(zip(names, args, strict=False)), **kwargs}
        if batch.get("labels") is None:
            return None
        _mark(batch, reads)
        return (), batch

    return model.register_forward_pre_hook(torch.compiler.disable(mark), with_kwargs=True, prepend=True)


def _mark(batch: Any, reads: Reads) -> None:
    """Mark a batch in place, where it holds labels."""
    if isinstance(labels := batch.get("labels"), Tensor):
        prompt = reads.find(batch, is_training=True)
        batch["instruction_mask"] = prompt.marks(labels.shape[1])
        batch["labels"] = prompt.labels
