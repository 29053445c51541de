"""The statistics of one recipe over all targets: made, fed, read, reset."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune import distributed, hooks, registry
from lightning_prune.targets import Binding, is_linear
from lightning_prune.types import Scorer

if TYPE_CHECKING:
    from lightning_prune.statistic import Statistic

__all__ = ["Observation", "Surrogate"]


class Surrogate(Protocol):
    """What stands in for the gradients of frozen targets, such as those of a LoRA over them."""

    def covers(self, parameter: Tensor) -> bool:
        """Return whether there will be something for this parameter."""
        ...

    def __call__(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (weight, gradient) shaped like the parameter, after a backward pass; None if it has not seen one."""
        ...


class Observation:
    """Holds one statistic per target for everything a scorer needs.

    Raises:
        ValueError: if a target has no observable input.
    """

    def __init__(self, scorer: Scorer, bindings: Sequence[Binding], surrogate: Surrogate | None = None) -> None:
        self.scorer, self.bindings, self.surrogate = scorer, bindings, surrogate
        self.statistics: dict[str, dict[str, Statistic]] = {binding.name: {} for binding in bindings}
        self._handles: list[RemovableHandle] = []
        for name, options in scorer.needs.items():
            kind = _kind(name)
            for binding in bindings:
                if kind.source == "input" and not is_linear(binding.module):
                    raise ValueError(
                        f"{type(scorer).__name__} needs the inputs of {binding.name}, but it does not belong to a "
                        "linear layer; exclude it, or use a scorer without input statistics such as Magnitude"
                    )
                local = distributed.local(binding.parameter.detach())
                self.statistics[binding.name][name] = kind(local, binding.shape_OI[1], **options)

    @property
    def has_inputs(self) -> bool:
        """Return whether layer inputs are needed."""
        return any(_kind(name).source == "input" for name in self.scorer.needs)

    @property
    def has_steps(self) -> bool:
        """Return whether gradients are needed."""
        return any(_kind(name).source == "step" for name in self.scorer.needs)

    def check_trainable(self) -> None:
        """Refuse frozen targets under a scorer that needs gradients, unless a LoRA is to stand in for them.

        Raises:
            ValueError: naming the first.
        """
        stands_in = (lambda parameter: False) if self.surrogate is None else self.surrogate.covers
        rest = [b for b in self.bindings if not b.parameter.requires_grad]
        frozen = [binding.name for binding in rest if not stands_in(binding.parameter)]
        if self.has_steps and frozen:
            raise ValueError(
                f"{type(self.scorer).__name__} needs gradients, but {frozen[0]} is frozen ({len(frozen)} targets in "
                "all); unfreeze it, exclude it, or use Magnitude or Wanda"
            )

    def start(
        self, model: nn.Module, bindings: Sequence[Binding] | None = None, *, only_training: bool = True
    ) -> list[RemovableHandle]:
        """Observe layer inputs, of all targets or of some, until the handles are removed or `stop` is called."""
        if not self.has_inputs:
            return []
        feeds = [
            (binding, statistic)
            for binding in (self.bindings if bindings is None else bindings)
            for statistic in self.statistics[binding.name].values()
            if statistic.source == "input"
        ]
        handles = hooks.observe_inputs(model, feeds, only_training=only_training)
        self._handles += handles
        return handles

    def stop(self) -> None:
        """Stop observing inputs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def feed_step(self, bindings: Sequence[Binding]) -> None:
        """Feed weights and gradients after an optimizer step; fused optimizers have unscaled them by then."""
        if not self.has_steps:
            return
        for binding in bindings:
            if binding.parameter.grad is not None:
                weight = distributed.local(binding.parameter.detach())
                self._feed(binding, weight, distributed.local(binding.parameter.grad))

    @torch.no_grad()
    def feed_surrogates(self) -> None:
        """Feed what stands in for the gradients of frozen targets, after an optimizer step."""
        if not self.has_steps or self.surrogate is None:
            return
        for binding in self.bindings:
            found = None if binding.parameter.requires_grad else self.surrogate(binding.parameter)
            if found is not None:
                self._feed(binding, *found)

    def _feed(self, binding: Binding, weight: Tensor, grad: Tensor) -> None:
        for statistic in self.statistics[binding.name].values():
            if statistic.source == "step":
                statistic.update(weight, grad)

    def read(self, binding: Binding, whole: bool) -> Mapping[str, Tensor]:
        """Return a target's statistics, merged over ranks: vectors of inputs, matrices of weights.

        Raises:
            ValueError: if nothing was observed yet.
        """
        values = {}
        for name, statistic in self.statistics[binding.name].items():
            if not self._is_fed(statistic, binding):
                raise ValueError(
                    f"{type(self.scorer).__name__} has observed nothing of {binding.name} yet; in training let the "
                    "schedule start at step 1 or later, with prune_once give batches that reach the layer; a layer "
                    "compiled before attaching hides its inputs: attach first"
                )
            value = statistic.compute()
            values[name] = value if statistic.source == "input" else binding.read(value, whole=whole)
        return values

    def _is_fed(self, statistic: "Statistic", binding: Binding) -> bool:
        """Return whether there is anything to read; of inputs, whether any rank has seen some."""
        if statistic.source == "input" and not distributed.agree(not statistic.update_called, binding.parameter.device):
            statistic._update_count = max(statistic._update_count, 1)  # no warning where other ranks have seen some
        return statistic.update_called

    def has_observed(self, binding: Binding) -> bool:
        """Return whether all statistics of a target were fed."""
        return all(statistic.update_called for statistic in self.statistics[binding.name].values())

    def restart_inputs(self) -> None:
        """Let input statistics start anew, so that each decision rests on what was seen since the last one."""
        for statistics in self.statistics.values():
            for statistic in statistics.values():
                if statistic.source == "input":
                    statistic.reset()


def _kind(name: str) -> Any:
    return registry.get("statistics", name)
