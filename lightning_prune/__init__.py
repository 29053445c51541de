"""Pruning and sparsity inside the training loop you already have."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.base.types import Report
    from lightning_prune.conductor.guard import MetricGuard
    from lightning_prune.conductor.sparsifier import Sparsifier
    from lightning_prune.granularity import NM, Block, Channel, Unstructured
    from lightning_prune.recipe.recipe import Recipe
    from lightning_prune.schedules import Cosine, Cubic, Existing, Geometric, Linear, Once
    from lightning_prune.targets.targets import Targets

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
    "conductor.guard": ("MetricGuard",),
    "recipe.recipe": ("Recipe",),
    "schedules": ("Cosine", "Cubic", "Existing", "Geometric", "Linear", "Once"),
    "conductor.sparsifier": ("Sparsifier",),
    "targets.targets": ("Targets",),
    "base.types": ("Report",),
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


class _ByFile(MetaPathFinder, Loader):
    """Finds an adapter by the name of its file, whichever folder of `integrations/` it stands in."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        head, _, leaf = name.rpartition(".")
        if head != f"{__name__}.integrations":
            return None
        found = (file for folder in path or () for file in sorted(Path(folder).glob(f"*/{leaf}.py")))
        file = next(found, None)
        return None if file is None else ModuleSpec(name, self, origin=f"{head}.{file.parent.name}.{leaf}")

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


sys.meta_path.append(_ByFile())
