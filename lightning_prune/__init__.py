"""Pruning and sparsity inside the training loop you already have."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when they are first used, so that the command line answers at once.
_HOMES = {
    "granularity": ("NM", "Block", "Channel", "Unstructured"),
    "guard": ("MetricGuard",),
    "recipe": ("Recipe",),
    "schedules": ("Cosine", "Cubic", "Existing", "Geometric", "Linear", "Once"),
    "sparsifier": ("Sparsifier",),
    "targets": ("Targets",),
    "types": ("Report",),
}


def __getattr__(name: str) -> Any:
    """Import the file that a public name stands in."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, also those not imported yet."""
    return sorted({*globals(), *__all__})
