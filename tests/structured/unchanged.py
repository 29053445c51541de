"""Check that a model is what it was: values, tensors, modes, hooks, patched methods, configurations."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["unchanged_since"]


def unchanged_since(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> Callable[[], bool]:
    """Return a function that says whether a model and its optimizers are what they are now."""
    before = _described(model, optimizers)
    return lambda: _same(before, _described(model, optimizers))


def _described(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "tensors": {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modules": {n: (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
                    for n, m in model.named_modules()},
        "config": None if config is None else copy.deepcopy(config.to_dict()),
        "optimizers": [_steps(optimizer) for optimizer in optimizers],
    }  # fmt: skip


def _steps(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "groups": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "options": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "state": {id(p): copy.deepcopy(dict(values)) for p, values in optimizer.state.items()},
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
