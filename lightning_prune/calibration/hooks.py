"""What is hooked into torch: layer inputs, gradients, and the end of an optimizer step.

Shapes: T tokens, I input features.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.base import distributed
from lightning_prune.calibration import padding
from lightning_prune.calibration.calls import Call, Calls, Hook, in_backward
from lightning_prune.targets.targets import Binding

__all__ = ["Fed", "clear_state", "mask_gradient", "observe_inputs", "unwrap_optimizer", "zero_pruned_gradient"]


def unwrap_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """Return the torch optimizer inside a trainer's wrapper.

    Raises:
        ValueError: if torch does not step it, so that no hook would fire.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(
            f"{type(inner).__module__}.{type(inner).__qualname__} is not stepped by torch, so masks cannot be held "
            "after its steps; train with a torch.optim optimizer (DDP or FSDP2 in place of DeepSpeed)"
        )
    return inner


def mask_gradient(parameter: Tensor, masks: Mapping[str, Tensor], name: str) -> RemovableHandle:
    """Zero the gradient of pruned weights as soon as it is accumulated."""

    def hook(param: Tensor) -> None:
        zero_pruned_gradient(param, masks, name)

    return parameter.register_post_accumulate_grad_hook(hook)


def zero_pruned_gradient(parameter: Tensor, masks: Mapping[str, Tensor], name: str) -> None:
    """Zero the gradient that pruned weights have now."""
    mask = masks.get(name)
    if mask is not None and parameter.grad is not None:
        distributed.local(parameter.grad).mul_(mask.view(torch.uint8))


def clear_state(optimizer: torch.optim.Optimizer, parameter: Tensor, changed: Tensor) -> None:
    """Zero what the optimizer remembers of weights whose mask changed: moments and master copies.

    Args:
        optimizer: its state is changed in place.
        parameter: the target's parameter.
        changed: bool, shaped like this process's part of the parameter.

    Raises:
        ValueError: if the state is not kept in floats, so that zero cannot be written into single entries.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        part = distributed.local(value)
        if not part.is_floating_point() or type(part) is not Tensor:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} as {part.dtype}, which cannot be reset for single weights; "
                "use an optimizer with float state"
            )
        part.masked_fill_(changed, 0)


class Fed(Protocol):
    """What takes in the inputs of a layer: a statistic."""

    is_by_sequence: ClassVar[bool]

    def feed(self, input_TI: Tensor, /) -> None:
        """Take in the tokens of one pass, or of one sequence where `is_by_sequence`."""
        ...


def observe_inputs(
    model: nn.Module | Calls,
    feeds: Sequence[tuple[Binding, Fed]],
    *,
    only_training: bool,
    skipped: dict[str, str] | None = None,
) -> list[RemovableHandle]:
    """Feed the inputs of targets' layers to their statistics, from every layer that holds the target.

    Padding is left out as the model's calls tell it, see `calls`. Passes that recompute activations in the backward
    pass are not counted twice.

    Args:
        model: what is called; or its calls, where they are followed already.
        feeds: targets, all of linear layers, and their statistics.
        only_training: whether to skip passes without gradients, and passes in evaluation mode once there was one in
            training mode.
        skipped: is told by target why a pass did not count.

    Returns:
        handles; removing them ends the observation.
    """
    calls = model if isinstance(model, Calls) else Calls(model)
    passes = _Passes(model if isinstance(model, nn.Module) else None, only_training, {} if skipped is None else skipped)
    handles = [] if calls is model else list(calls.handles)
    for binding, statistic in feeds:
        for module in binding.modules:
            feed = _Feed(calls, passes, binding.name, module, statistic)
            handles.append(module.register_forward_pre_hook(feed, with_kwargs=True))
    return handles


class _Passes:
    """Tells which passes count."""

    def __init__(self, model: nn.Module | None, only_training: bool, skipped: dict[str, str]) -> None:
        self.model, self.only_training, self.skipped = model, only_training, skipped
        self.has_trained = False

    def reason_against(self, call: Call | None) -> str | None:
        """Return why the pass that goes on does not count; None if it does."""
        if not self.only_training:
            return None
        if not (torch.is_grad_enabled() if call is None else call.has_gradient):
            return "it ran only without gradients"
        is_training = self.model is None or self.model.training
        self.has_trained |= is_training
        return None if is_training or not self.has_trained else "it ran only in evaluation mode"


class _Feed(Hook):
    """Feeds what a layer reads to a statistic."""

    def __init__(self, calls: Calls, passes: _Passes, name: str, module: nn.Module, statistic: Fed) -> None:
        self.calls, self.passes, self.name, self.module, self.statistic = calls, passes, name, module, statistic

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if in_backward() or module is not self.module:
            return
        outer = self.calls.innermost
        reason = self.passes.reason_against(outer)
        if reason is not None:
            self.passes.skipped.setdefault(self.name, reason)
            return
        inputs = args[0] if args else kwargs["input"]
        assert isinstance(inputs, Tensor)
        inputs = inputs.detach()
        keep = None if outer is None else Call(module, {}, (inputs,), outer).keep()
        parts = (
            padding.sequences(inputs, keep) if self.statistic.is_by_sequence else [padding.real_tokens(inputs, keep)]
        )
        for input_TI in parts:
            if len(input_TI):
                self.statistic.feed(input_TI)
            else:
                self.passes.skipped.setdefault(self.name, "it got nothing but padding")
