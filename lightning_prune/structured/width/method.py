"""Cut feed-forward units, heads or key/value groups from every block by a score, and refit what reads them.

The options of `block_by_block.prune_width` as a method that a recipe can name.

Source: Wanda, arXiv 2306.11695, or any other scorer, reduced to units; the order and the repair are those of weight
    subcloning and LIAR, arXiv 2407.13331; the global ranking is FLAP's, arXiv 2312.11983.
Cost: one forward pass of a block per group in it, and a Gram matrix of one layer.
Limits: see `block_by_block.prune_width`. A global budget or one per group gives blocks of different widths, which the
    stock class cannot hold: it needs per-layer shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lightning_prune.base import registry
from lightning_prune.base.bounds import at_least
from lightning_prune.base.types import Scorer
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import OutputChooser
from lightning_prune.structured.depth.planning import check_no_state_file
from lightning_prune.structured.groups import Kind, Plan
from lightning_prune.structured.method import Batch, StateFile, StructuredMethod
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.width.block_by_block import prune_width
from lightning_prune.structured.width.options import SUB_BLOCKS, Compensate, WidthOptions
from lightning_prune.structured.width.unit_scores import Reduction

__all__ = ["Width"]


@dataclass(frozen=True, kw_only=True)
class Width(StructuredMethod):
    """Cut units from every block by a score, and refit what reads them.

    Args:
        sparsity: kind of unit (ffn, heads, kv_groups, experts, channels) -> share of its units that go, in [0, 1).
        scorer: rates weights, or chooses units by the error of the output. Experts: a scorer that looks at inputs, such
            as Wanda, counts the tokens that are sent to each; others rate all weights of an expert.
        compensate: `least_squares`, `bias` or `none`. Whole experts have nothing that reads them: they go unrepaired.
        multiple_of: feed-forward widths that stay are multiples of it; those of stacked experts always of 8, where
            the model's own is one.
        budget: `uniform`, `global`, or `Group.key` -> sparsity for single groups.
        reduction: how scores of weights become scores of units; None follows the scorer.
        damping: of the refit; None follows the number of calibration tokens.
        seed: of random scores.
    """

    sparsity: Mapping[Kind, float]
    scorer: Scorer | OutputChooser = field(default_factory=Wanda)
    compensate: Compensate = "least_squares"
    multiple_of: int = 1
    budget: Literal["uniform", "global"] | Mapping[str, float] = "uniform"
    reduction: Reduction | None = None
    damping: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sparsity:
            raise ValueError("sparsity names no kind of unit; give for example {ffn: 0.25}")
        for kind, share in self.sparsity.items():
            if kind not in SUB_BLOCKS:
                raise ValueError(registry.unknown("kind of unit", kind, SUB_BLOCKS))
            if not 0 <= share < 1:
                raise ValueError(
                    f"sparsity must be in [0, 1), got {share} for {kind}; to remove whole blocks use SLEB or ShortGPT"
                )
        at_least(1, multiple_of=self.multiple_of)
        at_least(0, damping=self.damping, seed=self.seed)
        self._options()

    def _options(self) -> WidthOptions:
        return WidthOptions(
            self.scorer,
            self.sparsity,
            self.compensate,
            self.multiple_of,
            self.budget,
            self.reduction,
            self.damping,
            self.seed,
        )

    @property
    def needs_batches(self) -> bool:
        """Return whether units are scored or repaired by calibration data."""
        return self._options().repairs or bool(self._options().sources())

    @property
    def repairs(self) -> bool:
        """Return whether output projections are refitted."""
        return self._options().repairs

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Zero the units that go, repair the output projections in place, and return what stays."""
        check_no_state_file(self, state_file)
        for kind in self.sparsity:
            structure.of_kind(kind)
        return prune_width(
            model,
            list(structure.groups.values()),
            batches,
            scorer=self.scorer,
            sparsity=self.sparsity,
            compensate=self.compensate,
            multiple_of=self.multiple_of,
            budget=self.budget,
            reduction=self.reduction,
            damping=self.damping,
            seed=self.seed,
            progress=progress,
        )
