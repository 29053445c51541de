"""Switch blocks and sub-blocks off without removing them: their update of the residual stream becomes zero.

A block is bypassed by giving its input hidden state as its output, a sub-block by giving zeros as the output of its
module. Both are forward hooks: no weight and no shape changes, and with nothing bypassed no hook is set.

Source: the switch of the greedy depth methods (SLEB, arXiv 2402.09025; BlockPruner, arXiv 2406.10594); hooks are ours.
Cost: none in memory; what is bypassed is still computed.
Limits: a part is the smallest module that holds all its members. Where that is the block itself (OPT keeps fc1 and fc2
    in the block), or where the module adds the residual itself (its forward takes `residual`), the outputs of the
    output projections are zeroed instead. Call the model without cache: a bypassed attention would still write it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.structured.groups import Group, Kind
from lightning_prune.targets.targets import find_blocks

__all__ = ["Part", "SubBlock", "block_input", "bypassed", "first_tensor", "merge_parts", "num_parameters", "sub_blocks"]

Part = Literal["attention", "mlp"]
Hook = Callable[[nn.Module, tuple[object, ...], dict[str, object], object], object]

PART_OF_KIND: Mapping[Kind, Part] = {"heads": "attention", "kv_groups": "attention", "ffn": "mlp", "experts": "mlp"}


@dataclass(frozen=True, order=True)
class SubBlock:
    """The attention or the feed-forward part of one block."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"{self.part} {self.layer}"


def sub_blocks(model: nn.Module, groups: Sequence[Group]) -> dict[SubBlock, tuple[nn.Module, ...]]:
    """Find the modules whose outputs are the updates of the sub-blocks.

    Args:
        model: the model that the groups describe.
        groups: those of kinds heads and kv_groups make attention parts, ffn and experts feed-forward parts. Of a block
            without the former, the only other child that holds matrices is taken for its attention.

    Returns:
        per sub-block, in order of blocks, one module, or the output projections where no module is the part alone.

    Raises:
        ValueError: if a sub-block has neither a module of its own nor an output projection.
    """
    found: dict[SubBlock, list[Group]] = {}
    for group in groups:
        if group.layer is not None and group.kind in PART_OF_KIND:
            found.setdefault(SubBlock(group.layer, PART_OF_KIND[group.kind]), []).append(group)
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = find_blocks(model)
    own = {id(block) for block in blocks}
    parts = {key: _part_modules(key, found[key], modules, own) for key in found}
    for key in list(parts):
        attention = SubBlock(key.layer, "attention")
        rest = None if attention in parts else _rest_of_block(blocks[key.layer], parts[key])
        if rest is not None:
            parts[attention] = (rest,)
    return dict(sorted(parts.items()))


def _rest_of_block(block: nn.Module, mlp: tuple[nn.Module, ...]) -> nn.Module | None:
    """Return the one other child of a block that holds matrices: an attention whose heads cannot be cut."""
    taken = {id(module) for module in mlp}
    children = [
        child
        for child in block.children()
        if sum(parameter.ndim > 1 for parameter in child.parameters()) > 1
        and not any(id(module) in taken for module in child.modules())
    ]
    has_own_sum = len(children) == 1 and "residual" in inspect.signature(children[0].forward).parameters
    return children[0] if len(children) == 1 and not has_own_sum else None


def _part_modules(
    key: SubBlock, groups: Sequence[Group], modules: Mapping[str, nn.Module], blocks: set[int]
) -> tuple[nn.Module, ...]:
    """Return the smallest module that holds all members, or their output projections if that is a whole block."""
    owners = [member.name.rpartition(".")[0].split(".") for group in groups for member in group.members]
    path = owners[0]
    for owner in owners[1:]:
        same = [a == b for a, b in zip(path, owner, strict=False)]
        path = path[: [*same, False].index(False)]
    while isinstance(modules[".".join(path)], nn.ModuleList):
        path = path[:-1]
    module = modules[".".join(path)]
    parts_of_block = any(id(inner) in blocks for inner in module.modules())
    if not parts_of_block and "residual" not in inspect.signature(module.forward).parameters:
        return (module,)
    names = {member.name.rpartition(".")[0] for group in groups for member in group.readers}
    if not names:
        raise ValueError(f"{key} has no module of its own and no output projection; it cannot be bypassed")
    return tuple(modules[name] for name in sorted(names))


def num_parameters(modules: Sequence[nn.Module]) -> int:
    """Count the parameters of modules, shared ones once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def first_tensor(output: object) -> Tensor:
    """Return the hidden state of what a block gives: the tensor, or the first entry of a tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise ValueError(f"expected a tensor or a tuple that starts with one as output, got {type(first).__name__}")
    return first


def block_input(args: tuple[object, ...], kwargs: Mapping[str, object], output: Tensor) -> Tensor:
    """Return the hidden state that a block was called with: the first argument of the same shape as its output.

    Raises:
        ValueError: if no argument has that shape.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.shape == output.shape and value.is_floating_point():
            return value
    raise ValueError(f"no argument of the block has the shape {tuple(output.shape)} of its output")


def _with_first(output: object, first: Tensor) -> object:
    """Put another hidden state into an output, keeping its structure."""
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return type(output)(first, *output[1:])
    if isinstance(output, tuple | list):
        return type(output)((first, *output[1:]))
    return first


def _skip_block(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
    return _with_first(output, block_input(args, kwargs, first_tensor(output)))


def _skip_part(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
    return _with_first(output, torch.zeros_like(first_tensor(output)))


def _hook(stack: ExitStack, module: nn.Module, hook: Hook) -> None:
    handle: RemovableHandle = module.register_forward_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


@contextmanager
def bypassed(
    model: nn.Module, groups: Sequence[Group], *, layers: Sequence[int] = (), parts: Sequence[SubBlock] = ()
) -> Iterator[None]:
    """Make the residual update of blocks and sub-blocks zero; contexts may be nested.

    Args:
        model: the model that the groups describe.
        groups: used to find the modules of `parts`; may be empty without them.
        layers: indices of whole blocks.
        parts: sub-blocks.

    Raises:
        ValueError: if the model has no such block or sub-block.
    """
    blocks = find_blocks(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ValueError(f"block {layer} does not exist; the model has the blocks 0 to {len(blocks) - 1}")
    known = sub_blocks(model, groups) if parts else {}
    for part in parts:
        if part not in known:
            raise ValueError(f"no group describes {part}; there are {', '.join(map(str, known)) or 'none'}")
    with ExitStack() as stack:
        for layer in layers:
            _hook(stack, blocks[layer], _skip_block)
        for part in parts:
            for module in known[part]:
                _hook(stack, module, _skip_part)
        yield


def merge_parts(
    model: nn.Module, groups: Sequence[Group], parts: Sequence[SubBlock], forward: Callable[[], Tensor]
) -> tuple[tuple[int, ...], tuple[SubBlock, ...]]:
    """Replace the removal of all parts of a block by that of the block where this gives the same numbers.

    The two differ where a block changes the stream by more than its parts do, for example in post-norm models.

    Args:
        model: the model.
        groups: its groups.
        parts: the sub-blocks that are removed.
        forward: runs the model on some batch and returns its logits.

    Returns:
        the blocks that can be removed whole, and the remaining sub-blocks.
    """
    known = sub_blocks(model, groups)
    whole = []
    for layer in sorted({part.layer for part in parts}):
        here = [part for part in known if part.layer == layer]
        if set(here) <= set(parts):
            with bypassed(model, groups, parts=here):
                without_parts = forward()
            with bypassed(model, groups, layers=[layer]):
                without_block = forward()
            if torch.equal(without_parts, without_block):
                whole.append(layer)
    return tuple(whole), tuple(sorted(part for part in parts if part.layer not in whole))
