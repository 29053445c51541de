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
    from lightning_prune.allocations.erdos_renyi import ErdosRenyi
    from lightning_prune.allocations.global_rank import GlobalRank
    from lightning_prune.allocations.owl import OWL
    from lightning_prune.allocations.uniform import Uniform
    from lightning_prune.base.types import Report
    from lightning_prune.conditional.conditional_adapter import ConditionalAdapter
    from lightning_prune.conditional.early_exit import EarlyExit
    from lightning_prune.conditional.expert_choice import ExpertChoice
    from lightning_prune.conditional.heavy_light import HeavyLight
    from lightning_prune.conditional.instruction import Instruction
    from lightning_prune.conditional.skip_layer import SkipLayer
    from lightning_prune.conditional.task_units import TaskUnits
    from lightning_prune.conductor.guard import MetricGuard
    from lightning_prune.conductor.sparsifier import Sparsifier
    from lightning_prune.granularity import NM, Block, Channel, Unstructured
    from lightning_prune.recipe.recipe import Recipe
    from lightning_prune.schedules import Cosine, Cubic, Existing, Geometric, Linear, Once
    from lightning_prune.scorers.activation import Activation
    from lightning_prune.scorers.fluctuation import Fluctuation
    from lightning_prune.scorers.gradient import Gradient
    from lightning_prune.scorers.magnitude import Magnitude
    from lightning_prune.scorers.movement import Movement
    from lightning_prune.scorers.random import Random
    from lightning_prune.scorers.taylor import Taylor
    from lightning_prune.scorers.wanda import Wanda
    from lightning_prune.structured import Cut, GradualShrink, Plan, Structure, Width, discover, masked, shrink
    from lightning_prune.targets.targets import Targets

__version__ = "0.1.0"

__all__ = [
    "NM",
    "OWL",
    "Activation",
    "Block",
    "Channel",
    "ConditionalAdapter",
    "Cosine",
    "Cubic",
    "Cut",
    "EarlyExit",
    "ErdosRenyi",
    "Existing",
    "ExpertChoice",
    "Fluctuation",
    "Geometric",
    "GlobalRank",
    "Gradient",
    "GradualShrink",
    "HeavyLight",
    "Instruction",
    "Linear",
    "Magnitude",
    "MetricGuard",
    "Movement",
    "Once",
    "Plan",
    "Random",
    "Recipe",
    "Report",
    "SkipLayer",
    "Sparsifier",
    "Structure",
    "Targets",
    "TaskUnits",
    "Taylor",
    "Uniform",
    "Unstructured",
    "Wanda",
    "Width",
    "discover",
    "masked",
    "shrink",
]

# Imported when they are first used, so that the command line answers at once.
_HOMES = {
    "allocations.erdos_renyi": ("ErdosRenyi",),
    "allocations.global_rank": ("GlobalRank",),
    "allocations.owl": ("OWL",),
    "allocations.uniform": ("Uniform",),
    "base.types": ("Report",),
    "conditional.conditional_adapter": ("ConditionalAdapter",),
    "conditional.early_exit": ("EarlyExit",),
    "conditional.expert_choice": ("ExpertChoice",),
    "conditional.heavy_light": ("HeavyLight",),
    "conditional.instruction": ("Instruction",),
    "conditional.skip_layer": ("SkipLayer",),
    "conditional.task_units": ("TaskUnits",),
    "conductor.guard": ("MetricGuard",),
    "conductor.sparsifier": ("Sparsifier",),
    "granularity": ("NM", "Block", "Channel", "Unstructured"),
    "recipe.recipe": ("Recipe",),
    "schedules": ("Cosine", "Cubic", "Existing", "Geometric", "Linear", "Once"),
    "scorers.activation": ("Activation",),
    "scorers.fluctuation": ("Fluctuation",),
    "scorers.gradient": ("Gradient",),
    "scorers.magnitude": ("Magnitude",),
    "scorers.movement": ("Movement",),
    "scorers.random": ("Random",),
    "scorers.taylor": ("Taylor",),
    "scorers.wanda": ("Wanda",),
    "structured": ("Cut", "GradualShrink", "Plan", "Structure", "Width", "discover", "masked", "shrink"),
    "targets.targets": ("Targets",),
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
