"""Build the smaller model that a plan describes: a new configuration, and the tensors that are left.

The class is built from the new configuration, so every attribute is what the class makes it: head counts, rotary
tables, cache slots. Only weights are carried over.

Cost: tensors are cut one at a time; the parent's are given up as they are cut if it is to be consumed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.structured.cutting import Removal, cut_shape, cut_tensor, removal_of, scale_of, without_orphans
from lightning_prune.structured.discovery.blueprint import Blueprint, Path, leaves
from lightning_prune.structured.groups import Cut, Plan
from lightning_prune.structured.structure import Structure

__all__ = ["build_smaller", "check_no_shares", "check_whole", "field_edits", "parameters_on_meta"]


def check_whole(model: nn.Module) -> None:
    """Check that a model's tensors can be cut: whole, plain, real and not compiled.

    Raises:
        ValueError: naming the first tensor or wrapper in the way.
    """
    if hasattr(model, "_orig_mod") or any(getattr(module, "_compiled_call_impl", None) for module in model.modules()):
        raise ValueError("a compiled model keeps its old shapes; shrink the model first and compile the result")
    if getattr(model, "peft_config", None):
        raise ValueError(
            "shrink cuts the model below its adapters; merge them first (merge_and_unload), or remove them"
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if distributed.is_sharded(tensor):
            raise ValueError(f"{name} is sharded; gather the model on one process and shrink it there")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; load the weights first")
        is_weight = isinstance(tensor, nn.Parameter)
        if type(tensor.data) is not Tensor or (is_weight and tensor.ndim > 1 and not tensor.is_floating_point()):
            raise ValueError(f"{name} is quantized ({tensor.dtype}); shrink the model before it is quantized")


def check_no_shares(plan: Plan) -> None:
    """Check that a plan keeps the matrices of all blocks their own.

    Raises:
        ValueError: naming the first block that is to share.
    """
    for share in plan.share:
        raise ValueError(
            f"block {share.layer} is to share the matrices of block {share.donor}, which the stock class cannot "
            "express; export with format per_layer"
        )


def build_smaller(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    *,
    consume: bool = False,
    share: bool = False,
    blueprint: Blueprint | None = None,
) -> nn.Module:
    """Return a smaller model of the same class that holds what a plan keeps.

    Args:
        model: whole tensors on one device, unwrapped; unchanged unless it is to be consumed.
        structure: what `discover` found in it.
        plan: what stays.
        consume: whether to empty the parent's tensors one by one as they are cut, so that the two models never need
            more memory than the parent and its largest tensor.
        share: whether tensors that are not cut may be the parent's own; for a model that is thrown away soon.
        blueprint: of the model, if it was made already.

    Raises:
        ValueError: if the plan does not fit the model, or its class cannot have these shapes; nothing was changed.
    """
    check_whole(model)
    blueprint = blueprint or Blueprint(model)
    cuts = without_orphans(structure.groups, plan.cuts)
    layers = _layers(structure, plan)
    removal = removal_of(structure.groups, cuts, blueprint.shapes)
    edits = field_edits(structure, cuts, layers, blueprint.values)
    parent_name = _parent_names(structure, layers)
    _check_shapes(blueprint, edits, removal, parent_name, structure, layers)
    scales = scale_of(structure.groups, cuts, blueprint.shapes, removal)
    with parameters_on_meta():
        small: nn.Module = blueprint.model_class(blueprint.configuration(edits))
    source = model.state_dict(keep_vars=True)
    carry = _Carrier(source, removal, scales, parent_name, _uses(small, parent_name), consume, share)
    _fill(small, carry, requires_grad={name: tensor.requires_grad for name, tensor in source.items()}, of=parent_name)
    if hasattr(model, "generation_config"):
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


@dataclass
class _Carrier:
    """Gives each tensor of the smaller model, cut from the parent's, once."""

    source: Mapping[str, Tensor]
    removal: Removal
    scales: Mapping[str, tuple[float, float]]
    parent_name: Callable[[str], str]
    uses: dict[str, int]
    consume: bool
    share: bool

    def __call__(self, name: str) -> Tensor:
        """Return a tensor of the smaller model by its name there."""
        origin = self.parent_name(name)
        whole = self.source[origin].detach()
        tensor = cut_tensor(origin, whole, self.removal)
        if origin in self.scales:
            factor, offset = self.scales[origin]
            tensor = (tensor + offset) * factor - offset
        is_own = tensor.data_ptr() == whole.data_ptr()
        self.uses[origin] -= 1
        is_last = self.uses[origin] == 0
        if self.consume and is_last:
            self.source[origin].data = torch.empty(0, dtype=whole.dtype, device=whole.device)
        return tensor.clone() if is_own and not (self.share or (self.consume and is_last)) else tensor


def field_edits(
    structure: Structure, cuts: Mapping[str, Cut], layers: tuple[int, ...] | None, values: Mapping[str, Any]
) -> dict[Path, Any]:
    """Return the configuration fields that the smaller model needs, with their values.

    Raises:
        ValueError: if groups that share a field would keep different numbers of units.
    """
    flat = dict(leaves(values))
    edits: dict[Path, Any] = {}
    for path, counts in _counts(structure, cuts, layers, flat).items():
        old = flat[path]
        new: Any
        if isinstance(old, list):
            new = [counts.get(layer, old[layer]) for layer in range(len(old))]
        else:
            new = _single(path, structure, counts)
        if new != old:
            edits[path] = new
    for cut in cuts.values():
        group = structure.groups[cut.group]
        edits |= {tuple(name.split(".")): value for name, value in group.pins.items()}
        for name in group.epsilons:
            path = tuple(name.split("."))
            edits[path] = flat[path] * group.num_units / len(cut.keep)
    stack = structure.stack
    if layers is not None and stack is not None:
        edits[tuple(stack.field.split("."))] = len(layers)
        for name in stack.lists:
            path = tuple(name.split("."))
            current = edits.get(path, flat[path])
            edits[path] = [current[layer] for layer in layers]
        for layer in sorted(set(range(stack.num_layers)) - set(layers)):
            for name in stack.counters.get(layer, ()):
                path = tuple(name.split("."))
                edits[path] = edits.get(path, flat[path]) - 1
    return edits


def _counts(
    structure: Structure, cuts: Mapping[str, Cut], layers: tuple[int, ...] | None, flat: Mapping[Path, Any]
) -> dict[Path, dict[int | str, int]]:
    """Return field -> what it must be, by the block (or, outside of blocks, the module) that wants it."""
    result: dict[Path, dict[int | str, int]] = {}
    for key, group in structure.groups.items():
        if layers is not None and group.layer is not None and group.layer not in layers:
            continue
        num_removed = group.num_units - len(cuts[key].keep) if key in cuts else 0
        for name, step in group.fields.items():
            path = tuple(name.split("."))
            old: Any = step * group.num_units if flat[path] is None else flat[path]
            place: int | str = group.layer if isinstance(old, list) and group.layer is not None else group.name
            value = (old[place] if isinstance(place, int) else old) - step * num_removed
            wanted = result.setdefault(path, {})
            wanted[place] = min(value, wanted.get(place, value))  # heads and key/value groups of the same module
    return result


def _single(path: Path, structure: Structure, counts: Mapping[int | str, int]) -> int:
    examples = {value: place for place, value in counts.items()}
    if len(examples) > 1:
        shown = ", ".join(f"{value} in {place}" for value, place in sorted(examples.items())[:3])
        raise ValueError(
            f"the plan needs {'.'.join(path)} to be {shown}, but the stock class has one value for all; plan with a "
            "uniform budget, or export with per-layer shapes"
        )
    return next(iter(examples))


def _layers(structure: Structure, plan: Plan) -> tuple[int, ...] | None:
    if plan.skip:
        raise ValueError(
            "the plan removes attention or MLP of single blocks, which the stock class cannot leave out; export with "
            "per-layer shapes, or remove whole layers"
        )
    check_no_shares(plan)
    if plan.layers is None:
        return None
    if structure.stack is None:
        raise ValueError(f"layers cannot be removed: {structure.refused.get('layers', 'the model has no blocks')}")
    structure.stack.check_layers(plan.layers)
    return plan.layers


def _parent_names(structure: Structure, layers: tuple[int, ...] | None) -> Callable[[str], str]:
    stack = structure.stack
    if layers is None or stack is None:
        return lambda name: name
    return lambda name: stack.parent_name(name, layers)


def _check_shapes(
    blueprint: Blueprint,
    edits: Mapping[Path, Any],
    removal: Removal,
    parent_name: Callable[[str], str],
    structure: Structure,
    layers: tuple[int, ...] | None,
) -> None:
    """Check that the edited configuration builds exactly the tensors that are left."""
    built = blueprint.shapes_with(edits)
    what = f"{blueprint.model_class.__name__} with " + ", ".join(f"{'.'.join(p)}={v}" for p, v in edits.items())
    if built is None:
        raise ValueError(f"{what} cannot be built: {blueprint.why_not(edits)}")
    for name, shape in built.items():
        origin = parent_name(name)
        if origin not in blueprint.shapes:
            raise ValueError(f"{what} has {name}, for which the model has no weights ({origin})")
        left = cut_shape(origin, blueprint.shapes[origin], removal)
        if shape != left:
            raise ValueError(f"{what} has {name} of shape {shape}, while the plan leaves {left}")
    missing = {parent_name(name) for name in built} ^ set(blueprint.shapes)
    stack = structure.stack
    lost = sorted(
        name for name in missing if layers is None or stack is None or stack.layer_of(name) in (None, *layers)
    )
    if lost:
        raise ValueError(f"{what} has no place for {lost[0]}")


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters are on the meta device and whose buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _uses(small: nn.Module, parent_name: Callable[[str], str]) -> dict[str, int]:
    """Count how often each tensor of the parent is asked for."""
    seen: set[int] = set()
    result: dict[str, int] = {}
    for name, tensor in small.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[parent_name(name)] = result.get(parent_name(name), 0) + 1
    return result


def _fill(
    small: nn.Module, carry: Callable[[str], Tensor], *, requires_grad: Mapping[str, bool], of: Callable[[str], str]
) -> None:
    """Give every parameter and persistent buffer its tensor, tied parameters the same one."""
    new: dict[int, nn.Parameter] = {}
    persistent = set(small.state_dict(keep_vars=True))
    device: torch.device | None = None
    for prefix, module in small.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(carry(name), requires_grad=requires_grad[of(name)])
                module._parameters[leaf] = new[id(parameter)]
                device = new[id(parameter)].device
    seen: set[int] = set()
    for prefix, module in small.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer is not None and id(buffer) not in seen:
                module._buffers[leaf] = carry(name) if name in persistent else buffer.to(device)
                seen.add(id(module._buffers[leaf]))
