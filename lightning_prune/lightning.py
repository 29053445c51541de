"""The callbacks for PyTorch Lightning, and the checkpoint that waits for the masks to be final."""

from lightning_prune.integrations.trainers.lightning_checkpoint import PrunedCheckpoint
from lightning_prune.integrations.trainers.lightning_gradual_shrink import ShrinkingCallback
from lightning_prune.integrations.trainers.lightning_trainer import PruningCallback

__all__ = ["PrunedCheckpoint", "PruningCallback", "ShrinkingCallback"]
