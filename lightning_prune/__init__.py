"""Pruning and sparsity inside the training loop you already have."""

from lightning_prune.granularity import NM, Block, Channel, Unstructured
from lightning_prune.guard import MetricGuard
from lightning_prune.recipe import Recipe
from lightning_prune.schedules import Cosine, Cubic, Existing, Geometric, Linear, Once
from lightning_prune.sparsifier import Sparsifier
from lightning_prune.targets import Targets
from lightning_prune.types import Report

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Cosine",
    "Cubic",
    "Existing",
    "Geometric",
    "Linear",
    "MetricGuard",
    "Once",
    "Recipe",
    "Report",
    "Sparsifier",
    "Targets",
    "Unstructured",
]
