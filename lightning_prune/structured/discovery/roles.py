"""What a dimension is to its tensor, told from the module that owns it and from how that module behaves.

Nothing here goes by the names of classes: a norm is what gives the same for x and 3 x.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.structured.groups import Role
from lightning_prune.targets.targets import is_linear

__all__ = ["Dimension", "Norm", "Roles", "partition"]

Norm = Literal["rms", "mean"]


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor that grows with a number: its size is per_unit * number + rest."""

    name: str
    dim: int
    per_unit: int
    rest: int
    role: Role

    @property
    def pattern(self) -> tuple[str, int, int, int]:
        """Return what is the same in all blocks and experts."""
        name = ".".join("*" if part.isdigit() else part for part in self.name.split("."))
        return name, self.dim, self.per_unit, self.rest


class Roles:
    """Tells roles of the tensors of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.tensors: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
        self._norms: dict[str, tuple[Norm | None, float]] = {}

    def owner(self, name: str) -> nn.Module:
        """Return the module that owns a tensor."""
        return self.modules[name.rpartition(".")[0]]

    def is_stacked(self, name: str) -> bool:
        """Return whether a tensor holds the matrices of several experts."""
        return self.tensors[name].ndim == 3 and not isinstance(self.owner(name), _ConvNd)

    def role(self, name: str, dim: int) -> Role:
        """Return what a dimension is to its tensor."""
        module, ndim = self.owner(name), self.tensors[name].ndim
        if ndim == 1:
            return "norm" if self.norm(name)[0] is not None else "vector"
        if isinstance(module, nn.Embedding):
            return "out"
        if isinstance(module, _ConvNd):
            return "vector"
        if (
            ndim == 2
            and not is_linear(module)
            and any(value.ndim == 3 for value in module._parameters.values() if value is not None)
        ):
            return "vector"  # the biases of stacked experts
        is_transposed = is_linear(module) and not isinstance(module, nn.Linear)
        is_transposed = is_transposed or (ndim == 3 and bool(getattr(module, "is_transposed", False)))
        return "in" if (dim == ndim - 1) != is_transposed else "out"

    def norm(self, name: str) -> tuple[Norm | None, float]:
        """Return how the module that owns a vector normalises its input, and what it adds to the weight."""
        owner = name.rpartition(".")[0]
        if name not in self._norms:
            self._norms[name] = _norm(self.modules[owner], name.rpartition(".")[2], self.tensors[name].shape[0])
        return self._norms[name]


@torch.no_grad()
def _norm(module: nn.Module, leaf: str, size: int) -> tuple[Norm | None, float]:
    if is_linear(module) or leaf != "weight" or any(True for _ in module.children()):
        return None, 0.0
    double: Any = copy.deepcopy(module).float()
    input_TI = 10 * torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(double.weight.device)
    try:
        once, thrice, moved = double(input_TI), double(3 * input_TI), double(input_TI + 5)
        double.weight.zero_()
        at_zero = double(input_TI)
    except Exception:  # noqa: BLE001 - a module that cannot be called with one input is no norm
        return None, 0.0
    if not isinstance(once, Tensor) or once.shape != input_TI.shape or not torch.allclose(once, thrice, atol=1e-3):
        return None, 0.0
    bias = getattr(double, "bias", None)
    rest = at_zero if bias is None else at_zero - bias
    return ("mean" if torch.allclose(once, moved, atol=1e-3) else "rms"), 0.0 if bool((rest == 0).all()) else 1.0


def partition(dimensions: Sequence[Dimension], prefix: str = "") -> Iterator[tuple[str, list[Dimension]]]:
    """Yield the smallest modules that both write and read the units, with the dimensions below them."""
    children: dict[str, list[Dimension]] = {}
    for dimension in dimensions:
        rest = dimension.name[len(prefix) :].lstrip(".")
        child, dot, _ = rest.partition(".")
        children.setdefault(child if dot else "", []).append(dimension)
    inner = {child: below for child, below in children.items() if child and _is_complete(below)}
    outer = [dimension for child, below in children.items() if child not in inner for dimension in below]
    if not inner or (outer and not _is_complete(outer)):  # what is left over belongs to its neighbours
        if _is_complete(dimensions):
            yield prefix, list(dimensions)
        return
    for child, below in inner.items():
        yield from partition(below, f"{prefix}.{child}" if prefix else child)
    if outer:
        yield prefix, outer


def _is_complete(dimensions: Sequence[Dimension]) -> bool:
    return {"in", "out"} <= {dimension.role for dimension in dimensions}
