"""Physical shrinking: which dimensions belong together, which units to keep, and the smaller model."""

from lightning_prune.structured.cost import Budget, sparsity_within
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.gradual import GradualShrink
from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.in_place import cut_in_place
from lightning_prune.structured.shrink import masked, shrink
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.width.method import Width

__all__ = [
    "Budget",
    "Cut",
    "GradualShrink",
    "Group",
    "Plan",
    "Structure",
    "Width",
    "cut_in_place",
    "discover",
    "masked",
    "shrink",
    "sparsity_within",
]
