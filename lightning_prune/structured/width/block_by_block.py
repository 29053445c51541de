"""Choose units to remove from every block, remove them as zeros, and refit what reads them, block by block.

Each group is scored, cut and repaired on the model as it stands by then: the statistics of an output projection's
input come from blocks and sub-blocks that are already cut. The shapes stay; `shrink` cuts them by the plan.

Source: the order and the repair are those of weight subcloning and LIAR, arXiv 2407.13331, with targets from the cut
    model, which were better than targets from the dense one in our measurement; scores see the scorers.
Cost: one forward pass of a block per group in it, and one more for the next block; a Gram matrix of one layer; until
    the end, copies in main memory of what was zeroed and refitted, to go back to after an error.
Limits: whole tensors, no shards; statistics of inputs are merged over ranks, but gradients are not: with Taylor give
    every rank the same batches. Query heads or key/value groups, not both.

Shapes: O output features, I input features, J = I + 1, K kept inputs, U units.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed, registry
from lightning_prune.base.types import Scorer, Stats
from lightning_prune.calibration import hooks
from lightning_prune.calibration.calls import Calls
from lightning_prune.calibration.loss_gradients import observe_gradients
from lightning_prune.calibration.walk import Batch, evaluating, forward_all, walk_blocks
from lightning_prune.solvers.greedy_output import GreedyOutput, greedy_units, output_energy
from lightning_prune.structured.discovery.expert_mask import routed_around
from lightning_prune.structured.groups import Cut, Group, Kind, Member, Plan
from lightning_prune.structured.undo import Undo, undone_on_error
from lightning_prune.structured.width import budgets
from lightning_prune.structured.width.expert_usage import expert_usage
from lightning_prune.structured.width.options import (
    Chooser,
    Compensate,
    WidthOptions,
    bind,
    each_once,
    fingerprint,
    selected,
)
from lightning_prune.structured.width.repair import refit, write_columns_, zero_units_
from lightning_prune.structured.width.unit_scores import Reduction, standardize, unit_scores
from lightning_prune.targets.targets import find_blocks, is_linear

__all__ = ["prune_width"]

Readings = Mapping[str, Mapping[str, Tensor]]


def prune_width(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    *,
    scorer: Chooser,
    sparsity: Mapping[Kind, float],
    compensate: Compensate = "least_squares",
    multiple_of: int = 1,
    budget: Literal["uniform", "global"] | Mapping[str, float] = "uniform",
    reduction: Reduction | None = None,
    damping: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Zero the least important units of a model in place, repair the output projections, and return what stays.

    Experts that go keep their weights, since zeros would still be chosen; later blocks see a model without them.

    Args:
        model: changed in place; shapes stay.
        groups: the groups of the model; those of the kinds in `sparsity` are cut.
        batches: calibration batches, tokenised; may be empty where scores rest on weights and nothing is repaired.
        scorer: rates weights, or chooses units by the error of the output.
        sparsity: kind of group -> share of its units that go, in [0, 1).
        compensate: `least_squares` refits the kept columns (and the bias, where there is one), `bias` puts the mean
            of what is removed into the bias, `none` repairs nothing.
        multiple_of: feed-forward widths that stay are multiples of it.
        budget: `uniform` takes the same share everywhere, `global` ranks standardised scores of one kind over all
            groups, a mapping of `Group.key` to a sparsity overrides `sparsity` for these groups.
        reduction: how scores of weights become scores of units. Default: output projections alone for scorers that
            look at inputs, all members for others; sums. Of whole experts all that they hold counts; scorers that
            look at inputs rate them by the tokens that are sent to each, and none is made up for by a repair.
        damping: of the refit; None follows the number of calibration tokens.
        seed: of random scores.
        progress: whether to show bars.

    Returns:
        The plan; its `method` holds all options and the fingerprint of the calibration tokens.

    Raises:
        ValueError: if options contradict each other, a group cannot be treated, or batches are missing or too few.
            After this and any other error or interruption the model is as it was.
    """
    options = WidthOptions(scorer, dict(sparsity), compensate, multiple_of, budget, reduction, damping, seed)
    with undone_on_error(model) as undo:
        return _Width(model, groups, batches, options, undo, progress).run()


class _Width:
    """One pass over a model."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        options: WidthOptions,
        undo: Undo,
        progress: bool,
    ) -> None:
        self.model, self.batches, self.options, self.progress = model, batches, options, progress
        self.undo = undo
        self.groups = each_once(model, selected(groups, options), options)
        self.bindings = bind(model, self.groups, options)
        self.tensors = model.state_dict(keep_vars=True)
        self.gone: dict[str, set[int]] = {}
        self.device = distributed.local(next(model.parameters()).detach()).device
        self.scores: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.around = ExitStack()
        self.needs_walk = options.repairs or "input" in options.sources()
        self._check()

    def run(self) -> Plan:
        """Score, cut and repair all groups."""
        with evaluating(self.model), self.around:
            if "step" in self.options.sources():
                self.scores = self._scores_from_gradients()
            self.counts = self._count()
            self._check_counts()
            cuts = dict(self._walk() if self.needs_walk else ((g.key, self._cut(g, {})) for g in self.groups))
        method = self.options.as_dict() | {"calibration": fingerprint(self.batches) if self.batches else None}
        plan_cuts = (Cut(group.key, cuts[group.key]) for group in self.groups if group.key in cuts)
        return Plan(cuts=tuple(plan_cuts), method=method)

    def _check(self) -> None:
        """Refuse what could not be carried out, before anything is changed."""
        needs_batches = self.needs_walk or "step" in self.options.sources()
        if needs_batches and not self.batches:
            raise ValueError(
                f"{type(self.options.scorer).__name__} with compensate={self.options.compensate!r} needs calibration "
                "batches, got none; pass tokenised batches, or use Magnitude with compensate='none'"
            )
        for group in self.groups if self.needs_walk else ():
            for member in self._observed(group):
                if member.expert is not None or not is_linear(self.bindings[member.name].module):
                    raise ValueError(
                        f"{group.key}: the inputs of {member.name} cannot be seen, because it does not belong to a "
                        "linear layer of its own (stacked experts); use Magnitude, Random or Taylor with "
                        "compensate='none'"
                    )
            for member in group.readers if self.options.compensate == "bias" else ():
                if getattr(self.bindings[member.name].module, "bias", None) is None:
                    raise ValueError(
                        f"{member.name} has no bias that could take up the mean; use compensate='least_squares', which "
                        "needs none"
                    )
        if self.options.budget == "uniform":
            self._check_effect(self._count())

    def _check_effect(self, counts: Mapping[str, int]) -> None:
        """Refuse a sparsity that is too small to remove a single unit."""
        for kind, sparsity in self.options.sparsity.items():
            of_kind = [group for group in self.groups if group.kind == kind]
            if sparsity > 0 and all(counts[group.key] == group.num_units for group in of_kind):
                size = of_kind[0].num_units // of_kind[0].num_parts
                step = budgets.step_of(of_kind[0], self._multiple(of_kind[0])) // of_kind[0].num_parts
                raise ValueError(
                    f"sparsity {sparsity} of {kind} removes nothing: they come in runs of {size} that lose whole "
                    f"{'units' if step == 1 else f'multiples of {step}'}; give at least {step / size:.4g}, or leave "
                    f"{kind} out"
                )

    def _check_counts(self) -> None:
        """Refuse a budget that leaves everything."""
        if all(self.counts[group.key] == group.num_units for group in self.groups):
            raise ValueError(
                f"this budget removes nothing: all units of the {len(self.groups)} groups stay; give a higher sparsity"
            )

    # What is observed

    def _observed(self, group: Group) -> list[Member]:
        """Return the members whose layer inputs are needed."""
        members = list(group.readers)
        if isinstance(self.options.scorer, Scorer) and "input" in self.options.sources():
            members += self.options.scored(group)
        return list(dict.fromkeys(members))

    def _statistics(self, group: Group, member: Member, *, repair: bool) -> dict[str, Mapping[str, float]]:
        """Return the input statistics that one member needs."""
        scorer, needs = self.options.scorer, dict[str, Mapping[str, float]]()
        if not isinstance(scorer, Scorer):
            needs["gram"] = {}
        elif "input" in self.options.sources() and member in self.options.scored(group):
            needs |= scorer.needs
        if repair and member in group.readers and self.options.compensate != "none":
            needs["gram" if self.options.compensate == "least_squares" else "input_moments"] = {}
        return needs

    def _observe(
        self, groups: Sequence[Group], called: nn.Module | Calls, run: Callable[[], None], *, repair: bool = True
    ) -> dict[str, dict[str, Tensor]]:
        """Run the model, or a part of it, and return what was seen: member -> statistic -> value."""
        made: dict[str, dict[str, Any]] = {}
        for group in groups:
            for member in self._observed(group):
                binding, own = self.bindings[member.name], made.setdefault(member.name, {})
                for name, values in self._statistics(group, member, repair=repair).items():
                    kind: Any = registry.statistic(name)
                    own[name] = kind(binding.parameter.detach(), binding.shape_OI[1], **values)
        feeds = [(self.bindings[name], statistic) for name, own in made.items() for statistic in own.values()]
        handles = hooks.observe_inputs(called, feeds, only_training=False)
        counted = [group for group in groups if self.options.counts_tokens(group)]
        try:
            self.scores |= expert_usage(self.model, called, counted, run) if counted else {}
            if not counted:
                run()
        finally:
            for handle in handles:
                handle.remove()
        for binding, statistic in feeds:
            if not statistic.update_called:
                raise ValueError(f"no calibration token reached {binding.name}; give batches that do, or more of them")
        seen = {name: {key: statistic.compute() for key, statistic in own.items()} for name, own in made.items()}
        for name, own in made.items():
            if "input_moments" in own:
                seen[name]["mean"] = own["input_moments"].mean()
        return seen

    # Scores

    def _unit_scores(self, group: Group, readings: Readings) -> Tensor:
        """Return score_U from what was seen, or what was computed from gradients before."""
        scorer = self.options.scorer
        if group.key in self.scores:
            return self.scores[group.key]
        if not isinstance(scorer, Scorer):
            return sum((self._energy(group, member, readings) for member in group.readers), torch.zeros(()))
        scores = {}
        for member in self.options.scored(group):
            binding = self.bindings[member.name]
            stats = Stats(readings.get(member.name, {}), 0, self.options.seed)
            scores[member.name] = binding.from_matrix(scorer.score(binding.target(whole=True), stats))
        return unit_scores(group, scores, self.options.reduction_of(group))

    def _energy(self, group: Group, member: Member, readings: Readings) -> Tensor:
        weight_OI, gram_II, size = self._unit_columns(group, member, readings)
        return output_energy(weight_OI, gram_II, size=size).cpu()

    def _unit_columns(self, group: Group, member: Member, readings: Readings) -> tuple[Tensor, Tensor, int]:
        """Return the units' columns of a reader, their Gram matrix, and columns per unit."""
        if len(member.runs) > 1:
            raise ValueError(f"{member.name} reads a unit of {group.key} in several places; use a scorer such as Wanda")
        columns = member.positions(range(group.num_units)).to(self.device)
        weight_OI = self.bindings[member.name].target(whole=True).weight_OI
        gram_JJ = readings[member.name]["gram"]
        return weight_OI[:, columns], gram_JJ[columns][:, columns], member.runs[0][1]

    def _scores_from_gradients(self) -> dict[str, Tensor]:
        """Return score_U of all groups from the gradients of every sequence's loss."""
        scorer = self.options.scorer
        assert isinstance(scorer, Scorer)
        names = {member.name for group in self.groups for member in self.options.scored(group)}
        bindings = [self.bindings[name] for name in sorted(names)]
        observation, _ = observe_gradients(self.model, scorer, bindings, self.batches, progress=self.progress)
        readings = {binding.name: observation.read(binding, whole=True) for binding in bindings}
        return {group.key: self._unit_scores(group, readings) for group in self.groups}

    # Budgets

    def _count(self) -> dict[str, int]:
        """Return how many units of every group stay."""
        options = self.options
        if options.budget != "global":
            own = {} if isinstance(options.budget, str) else options.budget
            return {
                group.key: budgets.uniform(
                    group, own.get(group.key, options.sparsity[group.kind]), self._multiple(group)
                )
                for group in self.groups
            }
        readings: Readings = {}
        if "input" in options.sources():
            run = functools.partial(
                forward_all, self.model, self.batches, self.device, progress=self.progress, title="ranking units"
            )
            readings = self._observe(self.groups, self.model, run, repair=False)
        scores = {group.key: standardize(self._unit_scores(group, readings)) for group in self.groups}
        self.scores = {} if "input" in options.sources() else self.scores  # experts are counted again as they are cut
        counts: dict[str, int] = {}
        for kind, sparsity in options.sparsity.items():
            of_kind = [group for group in self.groups if group.kind == kind]
            counts |= budgets.by_rank(of_kind, scores, sparsity, self._multiple(of_kind[0])) if of_kind else {}
        return counts

    def _multiple(self, group: Group) -> int:
        return self.options.multiple_of if group.kind in ("ffn", "channels") else 1

    # Cuts

    def _walk(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Visit the blocks in order; return what stays of each group."""
        kept: list[tuple[str, tuple[int, ...]]] = []
        groups_of = self._groups_of_blocks()

        def visit(block: nn.Module, run: Callable[[], None]) -> None:
            self.around.close()
            for group in groups_of[id(block)]:
                readings = self._observe([group], calls, run)
                kept.append((group.key, self._cut(group, readings)))

        with Calls(self.model) as calls:
            walk_blocks(
                self.model,
                self.batches,
                [block for block in find_blocks(self.model) if id(block) in groups_of],
                visit,
                device=self.device,
                stop_after_blocks=True,
                progress=self.progress,
                announce=calls.switch,
            )
        missed = {group.key for group in self.groups} - {key for key, _ in kept}
        if missed:
            raise ValueError(
                f"no calibration batch reached the blocks of {', '.join(sorted(missed))}; give batches that do"
            )
        return iter(kept)

    def _groups_of_blocks(self) -> dict[int, list[Group]]:
        """Return block -> its groups, for the blocks that have some.

        Raises:
            ValueError: if a group lies in no block.
        """
        owner = {id(module): id(block) for block in find_blocks(self.model) for module in block.modules()}
        groups_of: dict[int, list[Group]] = {}
        for group in self.groups:
            members = self._observed(group)
            inside = self.bindings[members[0].name].module if members else self.model.get_submodule(group.name)
            block = owner.get(id(inside))
            if block is None:
                raise ValueError(
                    f"{group.key} lies in none of the repeated blocks of the model, which are walked in order"
                )
            groups_of.setdefault(block, []).append(group)
        return groups_of

    @torch.no_grad()
    def _cut(self, group: Group, readings: Readings) -> tuple[int, ...]:
        """Choose the units of one group, zero the others and repair what reads them; return the units that stay."""
        keep = self._choose(group, readings)
        removed = sorted(set(range(group.num_units)) - set(keep))
        if not removed:
            return keep
        repaired = []
        for member in group.readers if self.options.compensate != "none" else ():
            gone = self.gone.setdefault(member.name, set())
            gone.update(member.positions(removed).tolist())
            binding = self.bindings[member.name]
            keep_K = [column for column in range(binding.shape_OI[1]) if column not in gone]
            repaired.append((binding, keep_K, refit(binding, readings[member.name], keep_K, self.options)))
        if group.kind == "experts":  # zeros would still be chosen: no token is sent to them from here on
            self.around.enter_context(routed_around(self.model, {group.key: group}, [Cut(group.key, keep)]))
            return keep
        zero_units_(self.tensors, group, removed, self.undo)
        for binding, keep_K, (weight_OK, bias_O) in repaired:
            write_columns_(binding, keep_K, weight_OK, bias_O, self.undo)
        return keep

    def _choose(self, group: Group, readings: Readings) -> tuple[int, ...]:
        scorer, num_keep = self.options.scorer, self.counts[group.key]
        if not isinstance(scorer, GreedyOutput):
            return budgets.chosen(group, self._unit_scores(group, readings), num_keep)
        if len(group.readers) != 1:
            raise ValueError(
                f"GreedyOutput needs one output projection per group, {group.key} has {len(group.readers)}"
            )
        weight_OI, gram_II, size = self._unit_columns(group, group.readers[0], readings)
        num_remove = group.num_units - num_keep
        removed = greedy_units(weight_OI, gram_II, num_remove, scorer, size=size, num_parts=group.num_parts)
        return tuple(sorted(set(range(group.num_units)) - set(removed)))
