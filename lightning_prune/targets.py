"""Which parameters are pruned: include / exclude patterns over clean names, and how each is read as a matrix.

Shapes: O rows (output features), I columns (input features). Stacked expert weights of shape (E, O, I) are read as
E * O rows; a convolution kernel (O, I, ...) as O rows.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune import distributed
from lightning_prune.types import Target

__all__ = ["Binding", "Targets", "clean_name", "find_blocks", "is_linear"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
_Candidate = tuple[list[str], Tensor, list[nn.Module]]
_ROUTERS = ("*router*", "*.gate.weight", "*.gate.wg.weight")


def clean_name(name: str) -> str:
    """Remove what wrappers (DDP, compile, activation checkpoints, PEFT) add to a parameter's name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[:1] == ["module"] and len(parts) > 1:
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


@dataclass(frozen=True)
class Binding:
    """A target's parameter, found by name in the model as it is now, and how to read it as a matrix.

    `modules` are all that hold the parameter under any name, each once: a tied weight has several.
    """

    name: str
    parameter: Tensor
    modules: tuple[nn.Module, ...]
    is_transposed: bool
    is_convolution: bool

    @property
    def module(self) -> nn.Module:
        """Return the first module that holds the parameter."""
        return self.modules[0]

    @property
    def shape_OI(self) -> tuple[int, int]:
        """Return rows and columns of the whole weight."""
        shape = self.parameter.shape
        if self.is_convolution:
            return shape[0], shape[1:].numel()
        rows, cols = (shape[-1], shape[-2]) if self.is_transposed else (shape[-2], shape[-1])
        return shape[:-2].numel() * rows, cols

    def keeps_rows(self, rows_per_unit: int) -> bool:
        """Return whether every unit and every row lies on one process."""
        if not distributed.is_sharded(self.parameter):
            return True
        return rows_per_unit == 1 and not (self.is_transposed and self.parameter.ndim == 2)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Read a tensor shaped like the parameter, or some of its first rows, as (O, I)."""
        if self.is_convolution:
            return tensor.reshape(tensor.shape[0], self.shape_OI[1])
        if self.is_transposed:
            tensor = tensor.transpose(-1, -2)
        return tensor.reshape(-1, self.shape_OI[1])

    def from_matrix(self, matrix_OI: Tensor) -> Tensor:
        """Undo `to_matrix`."""
        shape = self.parameter.shape
        if self.is_convolution:
            return matrix_OI.reshape(-1, *shape[1:])
        if not self.is_transposed:
            return matrix_OI.reshape(-1, *shape[1:])
        stacked = matrix_OI.reshape(-1, *shape[1:-2], shape[-1], shape[-2]) if len(shape) > 2 else matrix_OI
        return stacked.transpose(-1, -2).contiguous()

    def read(self, tensor: Tensor, *, whole: bool) -> Tensor:
        """Read this process's part of a tensor shaped and sharded like the parameter as a matrix.

        With `whole` the parts are gathered first; every rank must then call it.
        """
        part = distributed.local(tensor)
        return self.to_matrix(distributed.gather(part, self.parameter) if whole else part)

    def target(self, *, whole: bool) -> Target:
        """Return what the formulas see."""
        num_rows = self.shape_OI[0]
        weight_OI = self.read(self.parameter.detach(), whole=whole)
        first = 0
        if not whole and distributed.is_sharded(self.parameter):
            first = distributed.row_range(self.parameter)[0] * (num_rows // self.parameter.shape[0])
        return Target(name=self.name, weight_OI=weight_OI, row_start=first, num_rows=num_rows)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Patterns over parameter names; `*` matches any text, dots included.

    Without `include`, targets are the weights of linear layers (and stacked experts) inside the repeated blocks of
    the model; embeddings, output heads, norms, biases and routers are left alone. An `include` pattern chooses
    exactly what it matches among parameters of two dimensions and more.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def resolve(self, model: nn.Module) -> list[Binding]:
        """Find the targets of a model, each tied weight once.

        Raises:
            ValueError: if a pattern matches nothing, nothing is left, or a target cannot be pruned.
        """
        distributed.reshard(model)
        candidates = list(_candidates(model))
        names = [name for aliases, _, _ in candidates for name in aliases]
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"target pattern {pattern!r} matches no weight; names look like {', '.join(map(repr, names[:3]))}"
                )
        automatic = set() if self.include else _default_names(model, candidates)
        bindings = []
        for aliases, parameter, modules in candidates:
            wanted = automatic.intersection(aliases) or any(_matches(name, self.include) for name in aliases)
            if wanted and not any(_matches(name, self.exclude) for name in aliases):
                bindings.append(_bind(aliases[0], parameter, tuple(modules)))
        if not bindings:
            raise ValueError(
                "no weight is left to prune; name targets with include patterns, for example "
                + ", ".join(map(repr, names[:3]))
            )
        return bindings


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Yield (all clean names, parameter, all owners) of every parameter of two dimensions and more, tied ones once."""
    found: dict[int, _Candidate] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False):
            if parameter.ndim >= 2 and not _is_adapter(leaf, prefix):
                names, _, owners = found.setdefault(id(parameter), ([], parameter, []))
                names.append(clean_name(leaf))
                if all(owner is not module for owner in owners):
                    owners.append(module)
    yield from found.values()


def _is_adapter(name: str, prefix: str) -> bool:
    """Return whether a parameter belongs to a PEFT adapter, which trains beside the masked weight."""
    return "lora_" in name or ".modules_to_save." in f".{prefix}."


def _linear_types() -> tuple[type[nn.Module], ...]:
    """Return the modules that multiply their input by their weight; transformers' Conv1D only if it is loaded."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies its input by its weight."""
    return isinstance(module, _linear_types())


def _default_names(model: nn.Module, candidates: list[_Candidate]) -> set[str]:
    linear = _linear_types()
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    blocks = {id(module) for block in find_blocks(model) for module in block.modules()}

    def names(*, inside: bool, kinds: tuple[type[nn.Module], ...]) -> set[str]:
        return {
            aliases[0]
            for aliases, parameter, (module, *_) in candidates
            if (isinstance(module, kinds) or (inside and parameter.ndim == 3 and not isinstance(module, _ConvNd)))
            and (id(module) in blocks or not inside)
            and module is not head
            and not any(_matches(name, _ROUTERS) for name in aliases)
        }

    return names(inside=True, kinds=linear) or names(inside=False, kinds=(*linear, _ConvNd))


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model in order: the children of its outermost lists of two and more modules."""
    blocks: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            is_list = isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1
            if is_list and any(parameter.ndim >= 2 for parameter in child.parameters()):
                blocks.extend(block for block in child.children() if any(True for _ in block.parameters()))
            else:
                walk(child)

    if isinstance(model, nn.Sequential) and len(model) > 1:
        return [block for block in model if any(True for _ in block.parameters())]
    walk(model)
    return blocks


def _bind(name: str, parameter: Tensor, modules: tuple[nn.Module, ...]) -> Binding:
    module = modules[0]
    plain = distributed.local(parameter.detach())
    if plain.is_meta:
        raise ValueError(f"target {name} is on the meta device and has no values; load the weights before attaching")
    if not plain.is_floating_point() or plain.element_size() < 2 or type(plain) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"target {name} is already quantized ({type(plain).__name__}, {plain.dtype}); prune before quantizing, "
            "or exclude it from the targets"
        )
    convolution = isinstance(module, _ConvNd)
    conv1d = isinstance(module, _linear_types()) and not isinstance(module, nn.Linear)
    transposed = conv1d or (parameter.ndim > 2 and bool(getattr(module, "is_transposed", False)))
    return Binding(name, parameter, modules, is_transposed=transposed, is_convolution=convolution)
