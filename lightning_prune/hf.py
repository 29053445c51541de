"""The callbacks for Hugging Face's Trainer and those built on it."""

from lightning_prune.integrations.trainers.hf_gradual_shrink import ShrinkingCallback
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback

__all__ = ["PruningCallback", "ShrinkingCallback"]
