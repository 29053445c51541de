"""The statistics of one recipe over all targets: made, fed, read, started anew."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.base import distributed, registry
from lightning_prune.base.types import Scorer
from lightning_prune.calibration import hooks
from lightning_prune.calibration.calls import Calls
from lightning_prune.targets.targets import Binding, is_linear

if TYPE_CHECKING:
    from lightning_prune.base.statistic import Statistic

__all__ = ["Observation", "Surrogate", "leave_out"]

_MOST_PATTERNS = 5


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

    Args:
        scorer: says what it needs.
        bindings: the targets.
        surrogate: stands in for the gradients of frozen targets.
        weigh_alike: whether all that is fed counts alike, in whatever order it comes, and not the latest most.

    Raises:
        ValueError: if a target has no observable input.
    """

    def __init__(
        self,
        scorer: Scorer,
        bindings: Sequence[Binding],
        surrogate: Surrogate | None = None,
        *,
        weigh_alike: bool = False,
    ) -> None:
        self.scorer, self.bindings, self.surrogate = scorer, bindings, surrogate
        self.statistics: dict[str, dict[str, Statistic]] = {binding.name: {} for binding in bindings}
        self.skipped: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        for name, options in scorer.needs.items():
            kind = _kind(name)
            values: dict[str, float | None] = {**options}
            if weigh_alike and "beta" in values:
                values["beta"] = None
            for binding in bindings:
                if kind.source == "input" and not is_linear(binding.module):
                    raise ValueError(
                        f"{type(scorer).__name__} needs the inputs of {binding.name}, but it does not belong to a "
                        "linear layer; exclude it, or use a scorer without input statistics such as Magnitude"
                    )
                local = distributed.local(binding.parameter.detach())
                self.statistics[binding.name][name] = kind(local, binding.shape_OI[1], **values)

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
        self, model: nn.Module | Calls, bindings: Sequence[Binding] | None = None, *, only_training: bool = True
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
        handles = hooks.observe_inputs(model, feeds, only_training=only_training, skipped=self.skipped)
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
                statistic.feed(weight, grad)

    def settle(self) -> None:
        """Let all ranks know of which inputs any has seen something, and something new; collective."""
        statistics = [s for own in self.statistics.values() for s in own.values() if s.source == "input"]
        if not statistics or not distributed.is_active():
            return
        device = distributed.local(self.bindings[0].parameter.detach()).device
        flags = [[s.update_called, s.update_called and not s.is_old] for s in statistics]
        counts = distributed.sum_everywhere(torch.tensor(flags, dtype=torch.int64, device=device)).tolist()
        for statistic, (num_fed, num_new) in zip(statistics, counts, strict=True):
            if num_new and statistic.is_old:
                statistic.reset()  # others have seen something since
                statistic.is_old = False
            if num_fed and not statistic.update_called:
                statistic._update_count, statistic.is_old = 1, not num_new  # no warning where others have seen some

    def read(self, binding: Binding, whole: bool) -> Mapping[str, Tensor]:
        """Return a target's statistics, merged over ranks: vectors of inputs, matrices of weights.

        Raises:
            ValueError: if nothing was observed yet.
        """
        if not self.has_observed(binding):
            raise ValueError(self.nothing_of([binding], in_training=True))
        values = {}
        for name, statistic in self.statistics[binding.name].items():
            value = statistic.compute()
            values[name] = value if statistic.source == "input" else binding.read(value, whole=whole)
        return values

    def has_observed(self, binding: Binding) -> bool:
        """Return whether all statistics of a target were fed, on some rank as of the last `settle`."""
        return all(statistic.update_called for statistic in self.statistics[binding.name].values())

    def rests_on_the_past(self, binding: Binding) -> bool:
        """Return whether nothing new was seen of a target since its statistics were to start anew."""
        return any(statistic.is_old for statistic in self.statistics[binding.name].values())

    def nothing_of(self, missed: Sequence[Binding], *, in_training: bool) -> str:
        """Return a sentence on targets that nothing was observed of: which, why, and what to do."""
        names = [binding.name for binding in missed]
        others = f" and {len(names) - 1} more targets" if len(names) > 1 else ""
        if self.has_steps:
            why = "no gradient of a label that counts has reached it"
        elif in_training:
            why = (
                self.skipped.get(names[0])
                or "no pass with gradients has reached it (or it was compiled before attaching)"
            )
        else:
            why = self.skipped.get(names[0], "no token of the batches reaches it")
        advice = "let the schedule start at step 1 or later" if in_training else "give batches that reach it"
        pattern = leave_out(names, [name for name in self.statistics if name not in set(names)])
        return f"{type(self.scorer).__name__} has observed nothing of {names[0]}{others}: {why}; {advice}{pattern}"

    def restart_inputs(self, bindings: Sequence[Binding]) -> None:
        """Let the input statistics of some targets start anew, as each decision rests on what was seen since the last.

        What nothing new is seen of keeps what it has.
        """
        self.skipped.clear()
        for binding in bindings:
            for statistic in self.statistics[binding.name].values():
                if statistic.source == "input":
                    statistic.restart()

    def end(self) -> None:
        """Stop observing, with nothing kept of what was read of inputs: no decision will rest on it."""
        self.stop()
        self.forget_inputs()

    def forget_inputs(self) -> None:
        """Let input statistics start from nothing."""
        for statistics in self.statistics.values():
            for statistic in statistics.values():
                if statistic.source == "input":
                    statistic.reset()
                    statistic.is_old = False


def leave_out(names: Sequence[str], others: Sequence[str]) -> str:
    """Return advice to leave some targets out: patterns that match them and no other, as short as parts of names allow.

    Nothing where there is no other target, or no short list.
    """
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        stems = (".".join(parts[:length]) for length in range(1, len(parts)))
        stem = next((stem for stem in stems if not any(other.startswith(f"{stem}.") for other in others)), None)
        found[name if stem is None else f"{stem}.*"] = None
    if not others or len(found) > _MOST_PATTERNS:
        return ""
    patterns = ", ".join(f'"{pattern}"' for pattern in found)
    return f", or leave it out with exclude: [{patterns}]"


def _kind(name: str) -> Any:
    return registry.get("statistics", name)
