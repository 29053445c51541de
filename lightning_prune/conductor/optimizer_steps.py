"""Optimizers as they really step: looked for inside wrappers, and heard of whoever calls them."""

import sys
from collections.abc import Callable, Iterator

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["after_any_step", "before_any_step", "is_inside_own_step", "levels", "was_skipped"]

# What only passes a step on, by the module that defines it; looked up among the loaded ones, so nothing is imported.
_SEE_THROUGH = {
    "accelerate.optimizer": "AcceleratedOptimizer",
    "lightning.fabric.wrappers": "_FabricOptimizer",
    "lightning.pytorch.core.optimizer": "LightningOptimizer",
    "lightning_fabric.wrappers": "_FabricOptimizer",
    "pytorch_lightning.core.optimizer": "LightningOptimizer",
}
_STEP_CODE = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__
Hook = Callable[[torch.optim.Optimizer, object, object], None]


def levels(optimizer: object) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers that take part in one step, from the outermost to the one that moves the weights.

    Trainers' wrappers are left out. An optimizer around another one, such as SAM, comes before it.

    Raises:
        ValueError: if torch does not step it, or it holds something around torch's step that no hook would see.
    """
    found: list[torch.optim.Optimizer] = []
    inner: object | None = optimizer
    last = inner
    while inner is not None:
        last, around = inner, inner
        inner = _inside(around)
        if isinstance(around, torch.optim.Optimizer) and _runs_hooks(around):
            found.append(around)
        elif isinstance(around, torch.optim.Optimizer) and inner is not None and not _is_see_through(around):
            raise ValueError(
                f"{_name(around)} steps an optimizer of its own and then changes weights where torch runs no hook "
                f"(as Lookahead does), so pruned weights would come back; train with its {type(inner).__name__} alone"
            )
    if not found or found[-1] is not last:
        raise ValueError(
            f"{_name(last)} is not stepped by torch, so masks cannot be held after its steps; train with a torch.optim "
            "optimizer (DDP or FSDP2 in place of DeepSpeed)"
        )
    return found


def _inside(optimizer: object) -> object | None:
    """Return the one optimizer inside another, or inside a wrapper."""
    if hasattr(optimizer, "optimizer"):
        inner: object = optimizer.optimizer
        return inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    held = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    return held[0] if len(held) == 1 else None


def _runs_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether torch has made the step run hooks: it does so where the base class is initialized."""
    step = type(optimizer).step
    return bool(getattr(step, "hooked", False)) and hasattr(optimizer, "_optimizer_step_post_hooks")


def _is_see_through(optimizer: object) -> bool:
    known = (getattr(sys.modules.get(module), name, None) for module, name in _SEE_THROUGH.items())
    return any(isinstance(optimizer, kind) for kind in known if kind is not None)


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def before_any_step(hook: Hook) -> RemovableHandle:
    """Call a hook before every step of every torch optimizer in this process."""
    return register_optimizer_step_pre_hook(hook)


def after_any_step(hook: Hook) -> RemovableHandle:
    """Call a hook after every step of every torch optimizer in this process."""
    return register_optimizer_step_post_hook(hook)


def is_inside_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the step that is ending was called by a step of the same optimizer: by `super().step()`.

    Torch runs the hooks of both. What is running is read from the stack, so an error in a step leaves nothing behind.
    """
    return sum(own is optimizer for own in _running_steps()) > 1


def _running_steps() -> Iterator[object]:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP_CODE:
            yield frame.f_locals.get("self")
        frame = frame.f_back  # type: ignore[assignment]


def was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a fused step was skipped because the gradient scaler found infinities.

    Other optimizers are not stepped at all then, and no hook fires.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())
