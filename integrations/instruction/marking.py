"""Mark, where batches are made, which tokens are the instruction.

Trainers that smooth labels or bring a loss of their own take the labels out of the batch before the model is called;
the mark stays in it. Trainers also count the labels of a batch to divide the loss by them, so the labels of a chunk
that is read go out here.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_prune.predictors.prompt import Reads

__all__ = ["MarkingCollator"]


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
        if isinstance(labels := batch.get("labels"), Tensor):
            prompt = self.reads.find(batch, is_training=True)
            batch["instruction_mask"] = prompt.marks(labels.shape[1])
            batch["labels"] = prompt.labels
        return batch
