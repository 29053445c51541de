"""Remove sub-blocks first, then feed-forward units, then key/value groups, each greedily and by its share of a budget.

Source: MultiPruner, arXiv 2501.09949 (IntelLabs/Hardware-Aware-Automated-Machine-Learning, MultiPruner). Differences:
    units stay where they are, the plan names those kept; the three budgets are added up, so that a stage that removes a
    little too much leaves less to the next; the order of units can be given.
Default unit order: L1 magnitude of the output weights, as in the paper. It is hardly better than a random order in our
    measurements; give an order from a score that knows the inputs (activation norm times weight).
Cost: one pass over the batches per candidate and removal, in all three stages.
Limits: the plan has different widths in different blocks.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_prune.base.bounds import at_least
from lightning_prune.structured.depth.bypass import SubBlock, sub_blocks
from lightning_prune.structured.depth.candidates import (
    choose_parts,
    part_candidates,
    unit_candidates,
    unit_magnitudes,
    unit_runs,
)
from lightning_prune.structured.depth.criteria import Criterion, SequencePerplexity
from lightning_prune.structured.depth.planning import make_plan, run_search
from lightning_prune.structured.depth.search import Candidate, Removal, Stop
from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.method import Batch, StateFile, StructuredMethod
from lightning_prune.structured.structure import Structure

__all__ = ["MultiPruner"]


@dataclass(frozen=True, kw_only=True)
class MultiPruner(StructuredMethod):
    """Spread a budget over sub-blocks, feed-forward units and key/value groups; see the module text.

    Args:
        parameter_share: removed parameters / all parameters of the model.
        split: shares of the budget for the three stages; they add up to 1. The paper's are (0.44, 0.52, 0.04) for
            Llama-2-7B and (0.3, 0.7, 0) for Llama-3.1-8B.
        ffn_step: feed-forward units removed at once; 1024 in the paper.
        head_step: key/value groups, or heads of equal rank, removed at once.
        order: per `Group.key` its units, most important first; by weight magnitude where none is given.
        criterion: what is kept low; SequencePerplexity is the paper's.
    """

    parameter_share: float
    split: tuple[float, float, float] = (0.44, 0.52, 0.04)
    ffn_step: int = 1024
    head_step: int = 1
    order: Mapping[str, Sequence[int]] = field(default_factory=dict)
    criterion: Criterion = field(default_factory=SequencePerplexity)

    def __post_init__(self) -> None:
        at_least(1, ffn_step=self.ffn_step, head_step=self.head_step)
        if not 0 < self.parameter_share < 1:
            raise ValueError(f"parameter_share must be in (0, 1), got {self.parameter_share}")
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split must hold three shares >= 0 that add up to 1, got {self.split}")

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose sub-blocks and units by three greedy searches that share one state file."""
        groups = list(structure.groups.values())
        orders = self._orders(model, groups)
        parts = list(sub_blocks(model, groups))
        detail = hashlib.sha256(repr((sorted(orders.items()), self.ffn_step, self.head_step)).encode()).hexdigest()[:16]
        gone: list[Candidate] = []

        def search(candidates: Sequence[Candidate], share: float) -> Removal:
            removal = run_search(
                self.criterion,
                model,
                batches,
                candidates,
                Stop(parameter_share=share),
                already=gone,
                detail=detail,
                state_file=state_file,
                progress=progress,
            )
            named = {candidate.label: candidate for candidate in candidates}
            gone.extend(named[label] for label in removal.labels)
            return removal

        removals = self._stages(model, groups, parts, orders, search)
        labels = {candidate.label for candidate in gone}
        return make_plan(
            self,
            model,
            structure,
            batches,
            parts=[part for part in parts if str(part) in labels],
            cuts=self._cuts(groups, orders, labels),
            found={
                "intact": removals[0].intact if removals else None,
                "order": [entry for removal in removals for entry in removal.as_dict()["order"]],
            },
        )

    def _stages(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        parts: Sequence[SubBlock],
        orders: Mapping[str, Sequence[int]],
        search: Callable[[Sequence[Candidate], float], Removal],
    ) -> list[Removal]:
        """Run the stages that have a budget; a sub-block that is gone has no units to remove."""
        removals: list[Removal] = []
        budgets = [self.parameter_share * sum(self.split[: stage + 1]) for stage in range(3)]
        if self.split[0]:
            choose_parts(model, groups, ("attention", "mlp"), ())
            removals.append(search(part_candidates(model, groups, parts), budgets[0]))
        labels = {label for removal in removals for label in removal.labels}
        for stage, part in ((1, "mlp"), (2, "attention")):
            if not self.split[stage]:
                continue
            there = {key.layer for key in parts if key.part == part and str(key) not in labels}
            chosen = [g for g in groups if g.key in orders and g.layer in there and (g.kind == "ffn") == (stage == 1)]
            candidates = [c for g in chosen for c in unit_candidates(model, g, self._runs(g, orders))]
            if not candidates:
                raise ValueError(
                    f"split gives {self.split[stage]} of the budget to units of {part} parts, but none can be removed; "
                    "use a smaller step or another split"
                )
            removals.append(search(candidates, budgets[stage]))
        return removals

    def _runs(self, group: Group, orders: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
        return unit_runs(orders[group.key], self.ffn_step if group.kind == "ffn" else self.head_step)

    def _orders(self, model: nn.Module, groups: Sequence[Group]) -> dict[str, list[int]]:
        """Return the units of the groups that can be cut one by one, most important first."""
        known = {group.key for group in groups}
        if unknown := sorted(set(self.order) - known):
            raise ValueError(f"order names the group {unknown[0]!r}, which is none of {', '.join(sorted(known))}")
        with_kv = {group.layer for group in groups if group.kind == "kv_groups"}
        orders: dict[str, list[int]] = {}
        for group in groups:
            free = group.kind in ("ffn", "kv_groups") or (group.kind == "heads" and group.layer not in with_kv)
            if group.layer is None or not free or group.num_parts > 1:
                continue
            if group.key in self.order:
                orders[group.key] = list(self.order[group.key])
                if sorted(orders[group.key]) != list(range(group.num_units)):
                    raise ValueError(f"order of {group.key} must name each of its {group.num_units} units once")
            else:
                orders[group.key] = unit_magnitudes(model, group).argsort(descending=True, stable=True).tolist()
        return orders

    def _cuts(self, groups: Sequence[Group], orders: Mapping[str, Sequence[int]], labels: set[str]) -> list[Cut]:
        cuts = []
        for group in groups:
            if group.key not in orders:
                continue
            runs = [run for index, run in enumerate(self._runs(group, orders)) if f"{group.key} {index}" in labels]
            removed = {unit for run in runs for unit in run}
            if removed:
                keep = tuple(unit for unit in range(group.num_units) if unit not in removed)
                group.check_keep(keep)
                cuts.append(Cut(group.key, keep))
        return cuts
