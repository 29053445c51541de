"""Cut a model while it trains: the same module objects with smaller tensors, and optimizers that go on with them.

The smaller model is built aside and its contents put into the modules that the training already holds, so that every
reference to them, every hook and every wrapper stays good. Optimizers get the new parameters in the places of the old
ones, with what they remember of the entries that stay; learning rates, their schedules and step counts are untouched.

Source: that optimizers must be re-pointed, or the new weights never move, was found by users of FasterAI (issues 92
    and 93) and NNI (issue 4521).
Cost: for a moment the model and the smaller model.
Limits: one process, or DistributedDataParallel, whose communication is built anew. Sharded models are refused. Weights
    that are scaled to make up for a norm over fewer residual channels keep the moments they had.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.calibration import hooks
from lightning_prune.structured.build import check_whole
from lightning_prune.structured.cutting import Removal, cut_tensor, removal_of, without_orphans
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.structure import Stack, Structure
from lightning_prune.structured.undo import undone_on_error

__all__ = ["cut_in_place"]


def cut_in_place(
    model: nn.Module,
    plan: Plan,
    optimizers: Iterable[object] = (),
    *,
    wrapper: nn.Module | None = None,
    structure: Structure | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Cut a model and carry its optimizers along.

    Call it between two optimizer steps. Gradients are dropped.

    Args:
        model: built from its configuration; whole tensors on one device.
        plan: what stays.
        optimizers: those that step its weights; a trainer's wrappers are looked through.
        wrapper: the DistributedDataParallel module around the model, if there is one.
        structure: what `discover` found in the model; found now if it is not given.
        inputs: a small batch of keyword arguments of its forward, see `shrink`.

    Raises:
        ValueError: if the plan does not fit the model, or its tensors or its optimizers' state cannot be cut. After
            this and any other error or interruption model, optimizers and wrapper are as they were.
    """
    check_whole(model)
    inner = [hooks.unwrap_optimizer(optimizer) for optimizer in optimizers]
    structure = discover(model, inputs) if structure is None else structure
    blueprint = Blueprint(model)
    cuts = without_orphans(structure.groups, plan.cuts)
    removal = removal_of(structure.groups, cuts, blueprint.shapes)
    _check_state(inner, model)
    small = shrink(model, plan, structure=structure, inputs=inputs)
    own = {id(tensor) for tensor in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    replaced = _replacements(model, small, structure, plan)
    with undone_on_error(model if wrapper is None else wrapper, inner):
        if plan.layers is not None and structure.stack is not None:
            _leave_blocks(model, structure.stack, plan.layers)
        _become(model, small)
        for optimizer in inner:
            _repoint(optimizer, own, replaced, removal)
        if wrapper is not None:
            distributed.rebuild(wrapper)


def _leave_blocks(model: nn.Module, stack: Stack, layers: Sequence[int]) -> None:
    """Take the other blocks out of their lists."""
    for container in stack.containers:
        blocks = model.get_submodule(container)
        kept = [blocks.get_submodule(str(layer)) for layer in layers]
        blocks._modules = {str(idx): block for idx, block in enumerate(kept)}


def _replacements(
    model: nn.Module, small: nn.Module, structure: Structure, plan: Plan
) -> dict[int, tuple[str, nn.Parameter]]:
    """Return id of a parameter -> its name and the parameter that takes its place."""
    before, stack = model.state_dict(keep_vars=True), structure.stack
    result: dict[int, tuple[str, nn.Parameter]] = {}
    for name, tensor in small.state_dict(keep_vars=True).items():
        origin = name if plan.layers is None or stack is None else stack.parent_name(name, plan.layers)
        if isinstance(tensor, nn.Parameter):
            result.setdefault(id(before[origin]), (origin, tensor))
    return result


def _check_state(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> None:
    """Check that what the optimizers remember is plain tensors that can be cut like their parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                is_odd = isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape
                if is_odd and id(parameter) in names:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key!r} of {names[id(parameter)]} in the shape "
                        f"{tuple(value.shape)} and not in the parameter's; cut between trainings instead, or train "
                        "with an optimizer such as AdamW or SGD"
                    )


def _become(model: nn.Module, small: nn.Module) -> None:
    """Give every module of a model what its counterpart in the smaller one holds."""
    common = set(vars(nn.Module()))
    targets = dict(model.named_modules(remove_duplicate=False))
    for name, source in small.named_modules(remove_duplicate=False):
        target = targets[name]
        assert type(target) is type(source), name
        target._parameters = dict(source._parameters)
        target._buffers = dict(source._buffers)
        for key, value in vars(source).items():
            if key not in common and not callable(value):  # sizes, head counts, the configuration
                target.__dict__[key] = value


def _repoint(
    optimizer: torch.optim.Optimizer,
    own: set[int],
    replaced: Mapping[int, tuple[str, nn.Parameter]],
    removal: Removal,
) -> None:
    """Put new parameters in the places of old ones; drop those of removed blocks."""
    for group in optimizer.param_groups:
        kept: list[Tensor] = []
        for old in group["params"]:
            found = replaced.get(id(old))
            state = optimizer.state.pop(old, None) if id(old) in own else None
            if id(old) not in own:
                kept.append(old)
            elif found is not None:
                name, new = found
                kept.append(new)
                if state is not None:
                    optimizer.state[new] = {key: _carried(value, old, name, removal) for key, value in state.items()}
        group["params"] = kept


def _carried(value: object, old: Tensor, name: str, removal: Removal) -> object:
    """Return what an optimizer remembers of the entries that stay."""
    is_like_weight = isinstance(value, Tensor) and value.shape == old.shape and value.ndim > 0
    return cut_tensor(name, value, removal).clone() if is_like_weight and isinstance(value, Tensor) else value
