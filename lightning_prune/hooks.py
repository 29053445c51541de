"""What is hooked into torch: layer inputs, gradients, and the end of an optimizer step.

Shapes: B sequences, T tokens, I input features.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune import distributed
from lightning_prune.targets import Binding

if TYPE_CHECKING:
    from lightning_prune.statistic import Statistic

__all__ = ["clear_state", "mask_gradient", "observe_inputs", "unwrap_optimizer", "zero_pruned_gradient"]


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


def observe_inputs(
    model: nn.Module,
    feeds: Sequence[tuple[Binding, "Statistic"]],
    *,
    only_training: bool,
) -> list[RemovableHandle]:
    """Feed the inputs of targets' layers to their statistics.

    Padding is left out where the model is called with a 2-D `attention_mask`. Passes that recompute activations in
    the backward pass are not counted twice.

    Args:
        model: what is called, for its attention mask.
        feeds: targets, all of linear layers, and their statistics.
        only_training: whether to skip passes in evaluation mode.

    Returns:
        handles; removing them ends the observation.
    """
    seen: dict[str, Tensor | None] = {"attention_mask": None}
    handles = [_watch_attention_mask(module, seen) for module in _called_with_attention_mask(model)]

    def add(binding: Binding, statistic: "Statistic") -> RemovableHandle:
        @torch.compiler.disable
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            is_copy = module is not binding.module
            if in_backward or is_copy or (only_training and not module.training):
                return
            assert isinstance(args[0], Tensor)
            inputs = args[0].detach()
            parts = _sequences(inputs, seen["attention_mask"]) if statistic.is_by_sequence else None
            for input_TI in parts or [_tokens(inputs, seen["attention_mask"])]:
                statistic.update(input_TI)

        return binding.module.register_forward_pre_hook(hook)

    return handles + [add(binding, statistic) for binding, statistic in feeds]


def _tokens(inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return input_TI without padding."""
    if attention_mask is not None and inputs.shape[:-1].numel() == attention_mask.numel():
        return inputs.reshape(-1, inputs.shape[-1])[attention_mask.reshape(-1).bool()]
    return inputs.reshape(-1, inputs.shape[-1])


def _sequences(inputs: Tensor, attention_mask: Tensor | None) -> Iterator[Tensor]:
    """Yield input_TI without padding of every sequence; flat inputs without a mask are one sequence."""
    if attention_mask is not None and inputs.shape[:-1].numel() == attention_mask.numel():
        inputs = inputs.reshape(*attention_mask.shape, inputs.shape[-1])
        parts = (input_TI[keep_T] for input_TI, keep_T in zip(inputs, attention_mask.bool(), strict=True))
    else:
        parts = (input_TI for input_TI in (inputs.flatten(0, -3) if inputs.ndim > 2 else inputs[None]))
    yield from (input_TI for input_TI in parts if len(input_TI))


def _called_with_attention_mask(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules whose forward takes one attention mask: of an encoder-decoder, its two sides."""
    parameters = inspect.signature(model.forward).parameters
    if "attention_mask" in parameters and "decoder_attention_mask" not in parameters:
        return [model]
    return [found for child in model.children() for found in _called_with_attention_mask(child)]


def _watch_attention_mask(module: nn.Module, seen: dict[str, Tensor | None]) -> RemovableHandle:
    signature = inspect.signature(module.forward)

    @torch.compiler.disable
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        mask = signature.bind_partial(*args, **kwargs).arguments.get("attention_mask")
        seen["attention_mask"] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    return module.register_forward_pre_hook(hook, with_kwargs=True)
