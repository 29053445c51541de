"""Prune once, without training: from the weights alone, from inputs block by block, or from gradients."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune.base import distributed
from lightning_prune.calibration import hooks
from lightning_prune.calibration.calls import Calls, Hook
from lightning_prune.calibration.loss_gradients import observe_gradients
from lightning_prune.calibration.observation import Observation
from lightning_prune.calibration.walk import Batch, evaluating, forward_all, walk_blocks
from lightning_prune.conductor.chosen_masks import Choice, choose, equal_scores, remarks
from lightning_prune.conductor.decision import Decision
from lightning_prune.conductor.held_masks import HeldMasks
from lightning_prune.targets.targets import Binding, find_blocks

__all__ = ["OneShot", "check_batches"]


class OneShot:
    """One pass of pruning over a model.

    Args:
        model: pruned in place.
        observation: the statistics of all targets.
        decide: makes the decision for some targets, by an observation.
        held: gets the masks.
        sparsity: wanted over all targets, in (0, 1).
        progress: whether to show bars.
    """

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        decide: Callable[[Sequence[Binding], Observation, HeldMasks], Decision],
        held: HeldMasks,
        *,
        sparsity: float,
        progress: bool,
    ) -> None:
        self.model, self.observation, self.bindings = model, observation, observation.bindings
        self.decide, self.held, self.sparsity = decide, held, sparsity
        self.progress = progress and distributed.is_first_rank()
        self.device = distributed.local(self.bindings[0].parameter.detach()).device
        self.reached: set[str] = set()
        self.unreached: list[Binding] = []
        self.remarks: dict[str, str] = {}
        self._removed: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def run(self, batches: Sequence[Batch]) -> list[str]:
        """Observe what the scorer needs and prune every target; return what one should know of the masks.

        Raises:
            ValueError: if the scorer needs batches and there are none, the model is sharded, or there is nothing to
                go by for a target. After this and any other error or interruption the weights are as they were.
        """
        observation = self.observation
        if not observation.has_inputs and not observation.has_steps:
            self._change(self.bindings, title="scoring")
            return self._notes()
        name = type(observation.scorer).__name__
        if not batches:
            raise ValueError(f"{name} needs calibration batches, got none; pass batches of model inputs")
        check_batches(batches)
        if any(distributed.is_sharded(binding.parameter) for binding in self.bindings):
            raise ValueError(f"{name} cannot calibrate a sharded model; prune before fully_shard, then shard")
        if observation.has_steps:
            self.observation, said = observe_gradients(
                self.model, observation.scorer, self.bindings, batches, progress=self.progress
            )
            self.remarks |= dict.fromkeys(said, said[0]) if said else {}
            self._change(self.bindings, title="scoring")
            return self._notes()
        with evaluating(self.model), Calls(self.model) as calls, self._restored_on_error():
            try:
                self._from_inputs(batches, calls)
            finally:
                observation.stop()
        return self._notes()

    def _notes(self) -> list[str]:
        if not self.unreached:
            return list(self.remarks.values())
        missed = f"{self.observation.nothing_of(self.unreached, in_training=False)}; it stays as it is"
        return [*self.remarks.values(), missed]

    def _change(
        self, bindings: Sequence[Binding], budgets: Mapping[str, float] | None = None, *, title: str | None = None
    ) -> None:
        """Choose the masks of some targets and put them in force."""
        if not bindings:
            return
        choice = choose(self._decision(bindings), self.observation, self.sparsity, budgets)
        self._check(choice)
        for kind, sentence in remarks(choice):
            self.remarks.setdefault(kind, sentence)
        hidden = title is None or not self.progress
        for binding, mask in tqdm(choice.masks, desc=title, total=len(bindings), disable=hidden):
            if self._removed is not None:
                weight = distributed.local(binding.parameter.detach())
                self._removed.append((weight, mask, weight[~mask].cpu()))
            self.held.set(binding, mask)

    def _decision(self, bindings: Sequence[Binding]) -> Decision:
        return self.decide(bindings, self.observation, self.held)

    def _check(self, choice: Choice) -> None:
        """Refuse targets that there is nothing to go by for, except parts of blocks that data reaches otherwise."""
        self.reached |= {b.name for b in self.bindings if self.observation.has_observed(b)}
        blocks = [(block, self._targets_in(block)) for block in find_blocks(self.model)] if choice.missed else []
        missed = [binding for binding in self._out_of_reach(blocks) if binding in choice.missed]
        if missed:
            raise ValueError(f"{self.observation.nothing_of(missed, in_training=False)}; no weight was changed")
        self.unreached += choice.missed
        if choice.blind:
            blind = {binding.name for binding in choice.blind}
            others = [binding.name for binding in self.bindings if binding.name not in blind]
            raise ValueError(f"{equal_scores(choice.blind, others)}; no weight was changed")

    # Inputs

    def _from_inputs(self, batches: Sequence[Batch], calls: Calls) -> None:
        first = self._decision(self.bindings)
        blocks = [(block, targets) for block in find_blocks(self.model) if (targets := self._targets_in(block))]
        if first.ranks_together or first.allocation.uses_scores or not blocks:
            self._observe_all(batches, calls, title="calibrating")
            if first.ranks_together or not blocks:
                self._change(self.bindings, title="scoring")
                return
        walked = self._blocks_called_once(batches, calls, blocks)
        reached = [binding for binding in self.bindings if binding.name in self.reached]
        budgets = dataclasses.replace(first, bindings=reached).budgets(self.sparsity)
        self.observation.forget_inputs()
        self._walk(batches, calls, walked, budgets)

    def _observe_all(self, batches: Sequence[Batch], calls: Calls, *, title: str) -> None:
        handles = self.observation.start(calls, only_training=False)
        forward_all(self.model, batches, self.device, progress=self.progress, title=title)
        for handle in handles:
            handle.remove()

    def _blocks_called_once(
        self, batches: Sequence[Batch], calls: Calls, blocks: Sequence[tuple[nn.Module, list[Binding]]]
    ) -> list[nn.Module]:
        """Run batches until no block is left that none of them reaches; return the blocks that can be walked.

        A block that is called several times for one batch, never as a whole, or not on every rank, cannot be stopped
        at, nor can one that shares a target with such a place.

        Raises:
            ValueError: if a target is not reached; nothing was changed by then.
        """
        counts = {id(block): [0, 0] for block, _ in blocks}  # calls of this batch, most calls of one batch
        handles = [block.register_forward_pre_hook(_Count(counts[id(block)])) for block, _ in blocks]
        seen = {binding.name: _Reached() for binding in self.bindings}
        feeds = [(binding, seen[binding.name]) for binding in self.bindings]
        handles += hooks.observe_inputs(calls, feeds, only_training=False, skipped=self.observation.skipped)
        for batch in batches:
            forward_all(self.model, [batch], self.device, progress=False, title="")
            for count in counts.values():
                count[:] = 0, max(count)
            if all(statistic.is_fed for statistic in seen.values()):
                break
        for handle in handles:
            handle.remove()
        fed = self._over_ranks([statistic.is_fed for statistic in seen.values()])
        self.reached = {name for name, (_, highest) in zip(seen, fed, strict=True) if highest}
        if missed := self._out_of_reach(blocks):
            raise ValueError(f"{self.observation.nothing_of(missed, in_training=False)}; no weight was changed")
        called = self._over_ranks([counts[id(block)][1] for block, _ in blocks])
        return _independent(
            [block for (block, _), found in zip(blocks, called, strict=True) if found == (1, 1)], self.bindings
        )

    def _over_ranks(self, values: Sequence[int]) -> list[tuple[int, int]]:
        """Return the lowest and the highest of every value over all ranks, which all call this."""
        return distributed.ranges(torch.tensor(values, device=self.device))

    def _out_of_reach(self, blocks: Sequence[tuple[nn.Module, list[Binding]]]) -> list[Binding]:
        """Return the targets that no batch has reached, nor any other target of their block."""
        beside = {b.name for _, targets in blocks if any(b.name in self.reached for b in targets) for b in targets}
        return [binding for binding in self.bindings if binding.name not in beside | self.reached]

    def _walk(
        self, batches: Sequence[Batch], calls: Calls, blocks: Sequence[nn.Module], budgets: Mapping[str, float]
    ) -> None:
        """Prune block by block; a target of several blocks after the last of them, what lies outside at the end."""
        targets_of = {id(block): self._targets_in(block) for block in blocks}
        uses = Counter(binding.name for targets in targets_of.values() for binding in targets)
        outside = [binding for binding in self.bindings if not uses[binding.name]]
        self.observation.start(calls, outside, only_training=False)

        def visit(block: nn.Module, run: Callable[[], None]) -> None:
            handles = self.observation.start(calls, targets_of[id(block)], only_training=False)
            run()
            for handle in handles:
                handle.remove()
            uses.subtract(binding.name for binding in targets_of[id(block)])
            self._change([binding for binding in targets_of[id(block)] if not uses[binding.name]], budgets)

        walk_blocks(
            self.model,
            batches,
            blocks,
            visit,
            device=self.device,
            stop_after_blocks=not outside,
            progress=self.progress,
            announce=calls.switch,
        )
        self._change([b for b in self.bindings if b in outside or uses[b.name] > 0], budgets)

    def _targets_in(self, block: nn.Module) -> list[Binding]:
        modules = {id(module) for module in block.modules()}
        return [b for b in self.bindings if any(id(module) in modules for module in b.modules)]

    @contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        """Put back what was pruned if the block ends with an error or an interruption, which goes on.

        Cost: the values that were pruned, in main memory, until the block ends.
        """
        self._removed = []
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for weight, mask, values in self._removed:
                    weight[~mask] = values.to(weight.device)
            raise
        finally:
            self._removed = None


class _Reached:
    """Stands for a statistic where only it matters whether it is fed."""

    is_by_sequence: ClassVar[bool] = False
    is_fed = False

    def feed(self, input_TI: Tensor, /) -> None:
        """Remember that there was something."""
        self.is_fed = True


class _Count(Hook):
    """Counts the calls of a module."""

    def __init__(self, count: list[int]) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: object) -> None:
        self.count[0] += 1


def _independent(blocks: list[nn.Module], bindings: Sequence[Binding]) -> list[nn.Module]:
    """Leave out blocks with a target that is also used outside of all blocks in the list."""
    while True:
        inside = {id(module) for block in blocks for module in block.modules()}
        mixed = [b for b in bindings if len({id(module) in inside for module in b.modules}) > 1]
        across = {id(module) for binding in mixed for module in binding.modules}
        rest = [block for block in blocks if not any(id(module) in across for module in block.modules())]
        if len(rest) == len(blocks):
            return blocks
        blocks = rest


def check_batches(batches: Sequence[Batch]) -> None:
    """Refuse batches that are no mappings or hold nothing.

    Raises:
        ValueError: naming the first.
    """
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"calibration batch {index} is a {type(batch).__name__}; give the model's arguments by name, such as "
                "{'input_ids': ids}"
            )
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.numel() == 0:
                raise ValueError(
                    f"calibration batch {index} holds nothing: {name} has shape {tuple(value.shape)}; leave it out"
                )
