"""Decide the masks of all targets at one sparsity: score, pool, split the budget, keep the best.

Nothing is changed here. Scores are computed target by target, again where a ranking over several targets needs them
again, so that at most one target's scores exist at a time.

Shapes: O rows, I columns of a weight; R x C units.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.allocations.uniform import Uniform
from lightning_prune.base import distributed, masks
from lightning_prune.base.types import Allocation, Granularity, Scorer, Stats
from lightning_prune.targets.targets import Binding
from lightning_prune.targets.ties import TieCounts, Ties, count_ties, extremes

__all__ = ["Decision", "check_combination"]

Read = Callable[[Binding, bool], Mapping[str, Tensor]]


def check_combination(scorer: Scorer, allocation: Allocation, granularity: Granularity) -> None:
    """Refuse options that would have no effect together.

    Raises:
        ValueError: if the allocation cannot matter under the scope or the granularity.
    """
    scope = granularity.scope(scorer.scope)
    name = type(allocation).__name__
    if isinstance(allocation, Uniform):
        return
    if scope == "global":
        raise ValueError(
            f"allocation {name} has no effect under scope: global, which ranks all targets together; "
            "use scope: tensor with it, or allocation Uniform"
        )
    if granularity.scope("tensor") != "tensor":
        raise ValueError(
            f"allocation {name} cannot be used with {type(granularity).__name__}, which gives every target the same "
            "sparsity; use Uniform"
        )


@dataclass(frozen=True)
class Decision:
    """One decision on the masks of some targets; a `Ranking` over their units.

    Args:
        bindings: the targets.
        scorer, granularity, allocation: the recipe's.
        held: masks that hold now, by name, shaped like the parameters (this process's rows); none yet is all kept.
        read: gives a target's statistics, as matrices, whole or this process's rows.
        step: optimizer steps taken.
        seed: the recipe's.
    """

    bindings: Sequence[Binding]
    scorer: Scorer
    granularity: Granularity
    allocation: Allocation
    held: Mapping[str, Tensor]
    read: Read
    step: int
    seed: int

    @property
    def names(self) -> list[str]:
        """Return the targets' names in order."""
        return [binding.name for binding in self.bindings]

    def _binding(self, name: str) -> Binding:
        return next(binding for binding in self.bindings if binding.name == name)

    def _is_whole(self, binding: Binding) -> bool:
        return not binding.keeps_rows(self.granularity.rows_per_unit)

    def unit(self, name: str) -> Tensor:
        """Return unit_RC, float32: this process's unit scores; pruned units that may not come back score -inf."""
        binding = self._binding(name)
        whole = self._is_whole(binding)
        target = binding.target(whole=whole)
        score_OI = self.scorer.score(target, Stats(self.read(binding, whole), self.step, self.seed))
        # NaN and infinity survive a sum, and with the sum over the shards every rank stops alike.
        masks.check_scores(name, self.sum(name, score_OI.sum(dtype=torch.float64)))
        if name in self.held and not self.scorer.dense_grad:
            score_OI = score_OI.masked_fill(~self._held_matrix(binding, whole), -torch.inf)
        return self.granularity.pool(score_OI)

    def _held_matrix(self, binding: Binding, whole: bool) -> Tensor:
        held = self.held[binding.name]
        return binding.to_matrix(distributed.gather(held, binding.parameter) if whole else held)

    def sum(self, name: str, values: Tensor) -> Tensor:
        """Sum over the processes that share the rows of a target."""
        binding = self._binding(name)
        return values if self._is_whole(binding) else distributed.all_reduce_sum(values, binding.parameter)

    def shape(self, name: str) -> tuple[int, int]:
        """Return (O, I) of the whole target."""
        return self._binding(name).shape_OI

    def num_weights(self, name: str) -> int:
        """Count the weights of the whole target."""
        rows, cols = self.shape(name)
        return rows * cols

    def num_units(self, name: str) -> int:
        """Count the units of the whole target."""
        rows, cols = self.shape(name)
        with torch.device("meta"):
            return self.granularity.pool(torch.empty(rows, cols)).numel()

    def global_kept(self, num_keep: int, names: Sequence[str]) -> dict[str, int]:
        """Rank the units of several targets together; return how many of the best `num_keep` each one holds."""
        return masks.find_cut(names, num_keep, unit=self.unit, total=self.sum).num_kept()

    def budgets(self, sparsity: float) -> dict[str, float]:
        """Return one sparsity per target; under scope `global` the split is made by the ranking itself."""
        if self.ranks_together:
            return dict.fromkeys(self.names, sparsity)
        return self.allocation.split(sparsity, self)

    def decide(self, budgets: Mapping[str, float]) -> Iterator[tuple[Binding, Tensor]]:
        """Yield (target, keep mask shaped like this process's part of the parameter), in order.

        A target's weights may be changed before the next mask is asked for; it does not affect the others.
        """
        for binding, _, keep_RC, _ in self._ranked(budgets):
            yield binding, self._finish(binding, keep_RC)

    def decide_with_ties(self, budgets: Mapping[str, float]) -> list[tuple[Binding, Tensor, Ties]]:
        """Return (target, keep mask, how much of it followed from the place of equal units), in order."""
        found = [
            (binding, self._finish(binding, keep_RC), self._tie_counts(binding, unit_RC, keep_RC, cut))
            for binding, unit_RC, keep_RC, cut in self._ranked(budgets)
        ]
        together = [sum(getattr(c, f"num_equal_{what}") for *_, c in found) for what in ("kept", "pruned")]

        def is_split(counts: TieCounts) -> bool:
            return all(together if self.ranks_together else (counts.num_equal_kept, counts.num_equal_pruned))

        return [(binding, mask, counts.judge(is_split=is_split(counts))) for binding, mask, counts in found]

    @property
    def ranks_together(self) -> bool:
        """Return whether all targets are ranked together."""
        return self.granularity.scope(self.scorer.scope) == "global"

    def _ranked(self, budgets: Mapping[str, float]) -> Iterator[tuple[Binding, Tensor, Tensor, masks.Cut | None]]:
        """Yield (target, unit_RC, keep_RC, the cut unless every row is ranked alone)."""
        scope = self.granularity.scope(self.scorer.scope)
        cut = self._cut(self.names, budgets[self.names[0]], self.unit) if self.ranks_together else None
        for binding in self.bindings:
            unit_RC = self.unit(binding.name)
            if scope == "row":
                num_keep = self.granularity.num_keep(budgets[binding.name], unit_RC.shape[1])
                yield binding, unit_RC, masks.keep_rows(unit_RC, num_keep), None
                continue
            own = cut or self._cut([binding.name], budgets[binding.name], {binding.name: unit_RC}.__getitem__)
            whole = self._is_whole(binding)
            yield binding, unit_RC, masks.keep_above(unit_RC, own, binding.name, binding.parameter, whole=whole), own

    def _tie_counts(self, binding: Binding, unit_RC: Tensor, keep_RC: Tensor, cut: masks.Cut | None) -> TieCounts:
        whole = self._is_whole(binding)
        matters_RC = self.granularity.pool(binding.target(whole=whole).weight_OI.abs().float()) > 0
        if cut is None:
            counts = count_ties(unit_RC, keep_RC, matters_RC, None)
        else:
            high, minus_low = extremes(unit_RC) if whole else distributed.maxima(extremes(unit_RC), binding.parameter)
            differs = bool(high > -minus_low)
            counts = count_ties(unit_RC, keep_RC, matters_RC, masks.at_cut(unit_RC, cut), differs=differs)
        return TieCounts(*self.sum(binding.name, counts).tolist())

    def _cut(self, names: Sequence[str], sparsity: float, unit: Callable[[str], Tensor]) -> masks.Cut:
        num_keep = self.granularity.num_keep(sparsity, sum(self.num_units(name) for name in names))
        return masks.find_cut(names, num_keep, unit=unit, total=self.sum)

    def _finish(self, binding: Binding, keep_RC: Tensor) -> Tensor:
        whole = self._is_whole(binding)
        rows, cols = binding.shape_OI
        if not whole and distributed.is_sharded(binding.parameter):
            rows = distributed.local(binding.parameter).shape[0] * (rows // binding.parameter.shape[0])
        keep = binding.from_matrix(self.granularity.expand(keep_RC, (rows, cols)))
        return distributed.shard(keep, binding.parameter) if whole else keep
