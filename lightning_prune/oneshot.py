"""Prune once, without training: from the weights alone, from inputs block by block, or from gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune import distributed
from lightning_prune.calibration import Batch, evaluating, forward_all, to_device, walk_blocks
from lightning_prune.decision import Decision
from lightning_prune.observation import Observation
from lightning_prune.targets import Binding, find_blocks

__all__ = ["CurrentBatch", "OneShot", "gradients", "token_labels"]


class OneShot:
    """One pass of pruning over a model.

    Args:
        model: pruned in place.
        observation: the statistics of all targets.
        decide: makes the decision for some targets.
        set_mask: puts a mask in force.
        sparsity: wanted over all targets, in (0, 1).
        progress: whether to show bars.
    """

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        decide: Callable[[Sequence[Binding]], Decision],
        set_mask: Callable[[Binding, Tensor], None],
        *,
        sparsity: float,
        progress: bool,
    ) -> None:
        self.model, self.observation, self.bindings = model, observation, observation.bindings
        self.decide, self.set_mask, self.sparsity = decide, set_mask, sparsity
        self.progress = progress and distributed.is_first_rank()
        self.device = distributed.local(self.bindings[0].parameter.detach()).device

    def run(self, batches: Sequence[Batch]) -> None:
        """Observe what the scorer needs and prune every target.

        Raises:
            ValueError: if the scorer needs batches and there are none, or the model is sharded.
        """
        if not self.observation.has_inputs and not self.observation.has_steps:
            self._change(self.bindings, title="scoring")
            return
        name = type(self.observation.scorer).__name__
        if not batches:
            raise ValueError(f"{name} needs calibration batches, got none; pass batches of model inputs")
        if any(distributed.is_sharded(binding.parameter) for binding in self.bindings):
            raise ValueError(f"{name} cannot calibrate a sharded model; prune before fully_shard, then shard")
        if self.observation.has_steps:
            with gradients(self.model, self.bindings):
                self._backward(batches)
            self._change(self.bindings, title="scoring")
            return
        with evaluating(self.model):
            self._from_inputs(batches)

    def _change(
        self, bindings: Sequence[Binding], budgets: Mapping[str, float] | None = None, *, title: str | None = None
    ) -> None:
        decision = self.decide(bindings)
        masks = decision.decide(decision.budgets(self.sparsity) if budgets is None else budgets)
        hidden = title is None or not self.progress
        for binding, mask in tqdm(masks, desc=title, total=len(bindings), disable=hidden):
            self.set_mask(binding, mask)

    def _from_inputs(self, batches: Sequence[Batch]) -> None:
        observe = self.observation
        first = self.decide(self.bindings)
        ranks_all = first.granularity.scope(first.scorer.scope) == "global"
        blocks = [(block, self._targets_in(block)) for block in find_blocks(self.model)]
        blocks = [(block, targets) for block, targets in blocks if targets]
        if ranks_all or first.allocation.uses_scores or not blocks:
            observe.start(self.model, only_training=False)
            forward_all(self.model, batches, self.device, progress=self.progress, title="calibrating")
            observe.stop()
            if ranks_all or not blocks:
                self._change(self.bindings, title="scoring")
                return
        budgets = first.budgets(self.sparsity)
        observe.restart_inputs()
        inside = {id(target) for _, targets in blocks for target in targets}
        outside = [binding for binding in self.bindings if id(binding) not in inside]
        current = CurrentBatch()
        observe.start(current, outside, only_training=False)
        targets_of = {id(block): targets for block, targets in blocks}

        def visit(block: nn.Module, run: Callable[[], None]) -> None:
            handles = observe.start(current, targets_of[id(block)], only_training=False)
            run()
            for handle in handles:
                handle.remove()
            self._change(targets_of[id(block)], budgets)

        walk_blocks(
            self.model,
            batches,
            [block for block, _ in blocks],
            visit,
            device=self.device,
            stop_after_blocks=not outside,
            progress=self.progress,
            announce=lambda batch: current(attention_mask=batch.get("attention_mask")),
        )
        observe.stop()
        missed = [binding for binding in self.bindings if id(binding) in inside and not observe.has_observed(binding)]
        self._change([*missed, *outside], budgets)  # one that was missed is refused by name

    def _targets_in(self, block: nn.Module) -> list[Binding]:
        modules = {id(module) for module in block.modules()}
        return [binding for binding in self.bindings if id(binding.module) in modules]

    def _backward(self, batches: Sequence[Batch]) -> None:
        """Feed the gradient of every batch's loss as one step."""
        for batch in tqdm(batches, desc="calibrating", disable=not self.progress):
            inputs = to_device(batch, self.device)
            if "labels" not in inputs:
                inputs |= token_labels(inputs)
            loss = getattr(self.model(**inputs), "loss", None)
            if loss is None:
                raise ValueError(
                    f"{type(self.observation.scorer).__name__} needs a loss, but the model returns none; add labels "
                    "to the batches"
                )
            loss.backward()
            self.observation.feed_step(self.bindings)
            for binding in self.bindings:
                binding.parameter.grad = None


class CurrentBatch(nn.Module):
    """Stands for the model where blocks run on their own: called with the mask of the batch that they run on."""

    def forward(self, attention_mask: object = None) -> None:
        """Do nothing; hooks on the call see the mask."""


def token_labels(inputs: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the input tokens as labels, padding left out; nothing if the model does not read tokens."""
    ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        return {}
    if isinstance(attention_mask, Tensor) and attention_mask.shape == ids.shape:
        return {"labels": ids.masked_fill(attention_mask == 0, -100)}
    return {"labels": ids}


@contextmanager
def gradients(model: nn.Module, bindings: Sequence[Binding]) -> Iterator[None]:
    """Collect gradients of the targets alone; modes, gradients and flags are put back afterwards."""
    targets = {id(binding.parameter) for binding in bindings}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with evaluating(model), torch.enable_grad():
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in targets)
            yield
        finally:
            for parameter, requires_grad, grad in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
