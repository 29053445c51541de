"""Find the parts of a block that a router acts on, by following one pass, and put something in their place.

A feed-forward part is the module whose output is what its output projection gives. Where no module is the part alone,
as in BERT, it is the chain of modules through which the values pass: the first of them then computes the whole, and the
others pass on what they are given. What takes the place is set as `forward` of the instance, so that names, classes and
hooks stay what they were.

Which tokens are real is read from the attention mask that the block, or a part of it, is called with, also while
activations are computed once more: nothing is kept from one pass to the next.

Shapes: B sequences, T tokens, D features, Q queries, L keys.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.calibration import padding
from lightning_prune.structured.build import check_whole
from lightning_prune.structured.depth.bypass import first_tensor
from lightning_prune.structured.discovery.probe import difference, outputs, tolerance
from lightning_prune.structured.discovery.probe_inputs import probe_inputs
from lightning_prune.structured.discovery.stack import blocks_of
from lightning_prune.structured.groups import Group
from lightning_prune.structured.structure import Stack, Structure

__all__ = [
    "MASKS",
    "STATES",
    "Block",
    "Called",
    "Padding",
    "Replaced",
    "blocks_with_calls",
    "ffn_chain",
    "inserting",
    "is_cache",
    "is_causal",
    "noting",
    "register",
    "without_caches",
]

MASKS = ("attention_mask", "mask")
STATES = ("encoder_hidden_states", "key_value_states")


@dataclass(frozen=True)
class Called:
    """One call of a module: how, what it read and what it gave."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    read: Tensor
    gave: Tensor


@dataclass(frozen=True)
class Block:
    """One block of a model and what a small batch did in it."""

    name: str
    layer: int
    module: nn.Module
    call: Called
    inner: tuple[Called, ...]


def blocks_with_calls(model: nn.Module, stack: Stack, layers: Sequence[int] | None = None) -> list[Block]:
    """Run a model on a small batch, and return its blocks.

    Args:
        model: whole tensors on one device, unwrapped.
        stack: its blocks.
        layers: the blocks that are wanted; all if it is not given.

    Raises:
        ValueError: if the model cannot be run, it has no such blocks, or a block is more than one module.
    """
    check_whole(model)
    wanted = range(stack.num_layers) if layers is None else layers
    if not wanted or any(not 0 <= layer < stack.num_layers for layer in wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(f"layers must be numbers from 0 to {stack.num_layers - 1}, each once, got {list(wanted)}")
    if len(stack.containers) != 1:
        raise ValueError(f"the blocks of {type(model).__name__} lie in several lists: {', '.join(stack.containers)}")
    modules = {layer: blocks_of(model, stack, layer)[0] for layer in wanted}
    for layer, module in modules.items():
        if any("forward" in vars(part) for part in module.modules()):
            raise ValueError(
                f"block {layer} has a forward of its own already: a model holds one conditional method at a time, and "
                "no hooks that move its parts between devices"
            )
    calls: list[Called] = []
    with ExitStack() as hooks:
        for part in {id(part): part for module in modules.values() for part in module.modules()}.values():
            hooks.callback(part.register_forward_hook(_Note(calls), with_kwargs=True).remove)
        outputs(model, probe_inputs(model))
    found = []
    for layer, module in modules.items():
        own = {id(part) for part in module.modules()}
        inner = tuple(call for call in calls if id(call.module) in own and call.module is not module)
        whole = [call for call in calls if call.module is module and call.read.ndim == 3]
        if len(whole) != 1:
            raise ValueError(f"block {layer} of {type(model).__name__} does not read (batch, tokens, features) once")
        found.append(Block(f"{stack.containers[0]}.{layer}", layer, module, whole[0], inner))
    return found


class _Note:
    """Notes calls of modules that read and give floating-point tensors."""

    def __init__(self, calls: list[Called]) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        read = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)
        first = output[0] if isinstance(output, tuple | list) and output else output
        if read is not None and isinstance(first, Tensor):
            self.calls.append(Called(module, args, dict(kwargs), read, first))


@torch.no_grad()
def is_causal(call: Called, forward: Callable[..., object]) -> bool:
    """Return whether earlier outputs of a block stay what they are when its last token changes."""
    arguments = without_caches(call)
    changed = call.read.clone()
    changed[:, -1] = changed[:, -1].flip(-1) * 2 + 1
    first, second = (
        first_tensor(forward(*swapped(arguments.args, call.read, x), **swapped(arguments.kwargs, call.read, x)))
        for x in (call.read, changed)
    )
    return torch.allclose(first[:, :-1], second[:, :-1], rtol=0, atol=1e-6 * float(first.abs().max()))


def swapped(values: Any, old: Tensor, new: Tensor) -> Any:
    """Return arguments with one tensor in the place of another."""
    if isinstance(values, Mapping):
        return {name: new if value is old else value for name, value in values.items()}
    return tuple(new if value is old else value for value in values)


def without_caches(call: Called) -> inspect.BoundArguments:
    """Return the arguments of a call by name, none of them a cache."""
    bound = inspect.signature(call.module.forward).bind(*call.args, **call.kwargs)
    for name, value in bound.arguments.items():
        if is_cache(value):
            bound.arguments[name] = None
        elif isinstance(value, dict):
            bound.arguments[name] = {n: None if is_cache(v) else v for n, v in value.items()}
    return bound


def is_cache(value: object) -> bool:
    """Return whether an argument is a cache of keys and values."""
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))


def ffn_chain(block: Block, structure: Structure, names: Mapping[int, str]) -> tuple[Group, tuple[nn.Module, ...]]:
    """Return the feed-forward units of a block, and the modules that compute with them, one after another.

    Args:
        block: with calls in evaluation mode.
        structure: what `discover` found, of kind ffn.
        names: identity of a module -> its name.

    Raises:
        ValueError: if the block has no such part, or several experts, or it does not pass from module to module.
    """
    groups = [g for g in structure.groups.values() if g.kind == "ffn" and f"{g.name}.".startswith(f"{block.name}.")]
    if not groups:
        reason = structure.refused.get("ffn", "none was found")
        raise ValueError(f"the feed-forward part of {block.name} cannot be told apart: {reason}")
    if len(groups) > 1 or any(member.expert is not None for member in groups[0].members):
        raise ValueError(
            f"the feed-forward part of {block.name} is {len(groups)} experts, which are chosen per token already; take "
            "a dense model, or conditional_adapter, which routes whole blocks"
        )
    group = groups[0]
    owners = {member.name.rpartition(".")[0] for member in group.members}
    readers = {member.name.rpartition(".")[0] for member in group.readers}
    chain = _chain(block, owners, readers, names)
    if chain is None:
        raise ValueError(
            f"the feed-forward part of {block.name} is computed between its modules, not by them, so that it cannot be "
            "called on some tokens"
        )
    return group, chain


def _chain(block: Block, owners: set[str], readers: set[str], names: Mapping[int, str]) -> tuple[nn.Module, ...] | None:
    held = {id(call.module): {names.get(id(part)) for part in call.module.modules()} for call in block.inner}
    last = [call for call in block.inner if names.get(id(call.module)) in readers]
    if len(last) != 1:
        return None
    whole = [c for c in block.inner if owners <= held[id(c.module)] and _same(c.gave, last[0].gave)]
    if whole:
        return (whole[-1].module,) if _is_tokens(whole[-1], block) else None
    chain = [last[0]]
    while not owners <= set().union(*(held[id(call.module)] for call in chain)):
        taken = set().union(*(held[id(call.module)] for call in chain))
        before = [c for c in block.inner if _same(c.gave, chain[0].read) and not held[id(c.module)] & taken]
        if not before:
            return None
        chain.insert(0, before[-1])
    return tuple(call.module for call in chain) if _is_tokens(chain[0], block) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _is_tokens(call: Called, block: Block) -> bool:
    """Return whether a part reads the tokens of its block, and nothing else."""
    given = [value for value in (*call.args, *call.kwargs.values()) if value is not None]
    return len(given) == 1 and call.read.shape[:-1].numel() == block.call.read.shape[:-1].numel()


class Padding:
    """Knows which tokens are real from the masks that blocks are called with."""

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self._mask: object = None
        self._keep: Tensor | None = None

    def note(self, arguments: Mapping[str, Any]) -> None:
        """Take in the arguments of a call, by name."""
        if any(arguments.get(name) is not None for name in STATES):
            return  # its mask is that of other tokens
        mask = next((arguments[name] for name in MASKS if name in arguments), None)
        if mask is not self._mask:
            is_empty = isinstance(mask, Tensor) and mask.is_floating_point() and not bool(mask.any())
            self._mask, self._keep = mask, None if is_empty else padding.kept_by(mask)  # zeros are added to scores

    def tokens(self, x: Tensor) -> Tensor:
        """Return x_BTD of what may be flat."""
        return x if x.ndim == 3 or self.shape is None else x.reshape(*self.shape, x.shape[-1])

    def keep(self, x_BTD: Tensor) -> Tensor | None:
        """Return keep_BT, bool, of tokens that are read now; None if all are real or nothing is known."""
        if self._keep is None:
            return None
        num_rows, num_tokens = x_BTD.shape[:2]
        keep_BL = self._keep[:, -num_tokens:]
        if keep_BL.shape[1] != num_tokens or len(keep_BL) not in (1, num_rows):
            return None
        return keep_BL.expand(num_rows, -1).to(x_BTD.device)


class _Noting:
    """Tells the padding what a block, or a part of it, is called with."""

    def __init__(self, module: nn.Module, padding: Padding, *, is_block: bool) -> None:
        self.padding, self.is_block = padding, is_block
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_block:
            read = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3), None)
            self.padding.shape = None if read is None else (read.shape[0], read.shape[1])
        self.padding.note({**dict(zip(self.names, args, strict=False)), **kwargs})


def noting(blocks: Iterable[Block], undo: ExitStack) -> Padding:
    """Let one object know the padding of what runs in some blocks."""
    known = Padding()
    for block in blocks:
        for part in block.module.modules():
            takes = inspect.signature(part.forward).parameters
            if part is block.module or any(name in takes for name in MASKS):
                hook = _Noting(part, known, is_block=part is block.module)
                undo.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return known


class Replaced:
    """What stands as `forward` of a module; `computed` is what stood there, for copies of the module too."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.computed: Callable[..., Any] = module.forward

    @property
    def __signature__(self) -> inspect.Signature:
        """Return that of what stood there, for those who look which masks a module takes."""
        return inspect.signature(self.computed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the first argument on; what computes something overrides it."""
        return args[0] if args else next(iter(kwargs.values()))

    def put(self, undo: ExitStack) -> None:
        """Stand in the module's place until the changes are undone."""
        own = vars(self.module).get("forward")
        self.module.forward = self
        undo.callback(_put_back, self.module, own)


def _put_back(module: nn.Module, own: Any) -> None:
    del module.forward
    if own is not None:
        module.forward = own


@contextmanager
def inserting(model: nn.Module) -> Iterator[ExitStack]:
    """Give the stack of what undoes an insertion; undo it if that fails or changes what the model computes.

    Raises:
        ValueError: if the model computes something else afterwards, although all tokens are still chosen.
    """
    inputs = probe_inputs(model)
    before = outputs(model, inputs)
    undo = ExitStack()
    with ExitStack() as failing:
        failing.callback(undo.close)
        yield undo
        gap = difference(outputs(model, inputs), before)
        if not gap <= tolerance(before):
            raise ValueError(
                f"{type(model).__name__} would compute something else with routers (by {gap:.1e}), although all tokens "
                "are still chosen; it does more with these parts than call them"
            )
        failing.pop_all()


def register(parent: nn.Module, name: str, child: nn.Module, undo: ExitStack) -> None:
    """Add a module inside another until the changes are undone.

    Raises:
        ValueError: if the name is taken.
    """
    if hasattr(parent, name):
        raise ValueError(
            f"{type(parent).__name__} has a {name!r} already; a model holds one conditional method at a time"
        )
    parent.add_module(name, child)
    undo.callback(delattr, parent, name)
