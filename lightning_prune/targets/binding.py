"""A target's parameter, found in a model, and how it is read as a matrix.

Shapes: O rows (output features), I columns (input features).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.types import Target
from lightning_prune.targets.layouts import Layout
from lightning_prune.targets.reparametrized import Source

__all__ = ["Binding", "check_trained_once"]


@dataclass(frozen=True)
class Binding:
    """A target's parameter, found by name in the model as it is now, and how to read it as a matrix.

    `modules` are all layers that use the parameter under any name, each once: a tied weight has several. `source`
    tells how a reparametrized layer computes its weight from it, and `copies` are further parameters over the same
    memory.
    """

    name: str
    parameter: Tensor
    modules: tuple[nn.Module, ...]
    layout: Layout
    source: Source | None = None
    copies: tuple[Tensor, ...] = ()

    @property
    def module(self) -> nn.Module:
        """Return the first module that holds the parameter."""
        return self.modules[0]

    @property
    def shape_OI(self) -> tuple[int, int]:
        """Return rows and columns of the whole weight."""
        return self.layout.shape_OI(self.parameter.shape)

    @property
    def num_taps(self) -> int:
        """Return how often the input channels repeat along the columns: the positions of a kernel, else 1."""
        return self.layout.num_taps(self.parameter.shape)

    @property
    def effective(self) -> Tensor:
        """Return the weight that the layer multiplies by: the parameter, or what a weight norm makes of it."""
        if self.source is None or self.source.compute is None:
            return self.parameter.detach()
        return self.source.compute().detach()

    def spare_norms(self, mask: Tensor) -> Tensor:
        """Return a mask in which every norm of a weight norm keeps its largest weight: one of nothing gives NaN."""
        return mask if self.source is None else self.source.spare(self.parameter.detach(), mask)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Let the gain of a weight norm follow what is done to its direction, so that all other weights stay."""
        source, direction = self.source, self.parameter.detach()
        before = None if source is None else source.norms(direction)
        yield
        if source is not None:
            source.follow(direction, before)

    def keeps_rows(self, rows_per_unit: int) -> bool:
        """Return whether every unit and every row lies on one process."""
        return not distributed.is_sharded(self.parameter) or (rows_per_unit == 1 and self.layout.is_by_rows)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """Read a tensor shaped like the parameter, or some of its first rows, as (O, I)."""
        return self.layout.to_matrix(tensor, self.parameter.shape)

    def from_matrix(self, matrix_OI: Tensor) -> Tensor:
        """Undo `to_matrix`."""
        return self.layout.from_matrix(matrix_OI, self.parameter.shape)

    def read(self, tensor: Tensor, *, whole: bool) -> Tensor:
        """Read this process's part of a tensor shaped and sharded like the parameter as a matrix.

        With `whole` the parts are gathered first; every rank must then call it.
        """
        part = distributed.local(tensor)
        return self.to_matrix(distributed.gather(part, self.parameter) if whole else part)

    def target(self, *, whole: bool) -> Target:
        """Return what the formulas see."""
        num_rows = self.shape_OI[0]
        weight_OI = self.read(self.effective, whole=whole)
        first = 0
        if not whole and distributed.is_sharded(self.parameter):
            first = distributed.row_range(self.parameter)[0] * (num_rows // self.parameter.shape[0])
        return Target(name=self.name, weight_OI=weight_OI, row_start=first, num_rows=num_rows)


def check_trained_once(bindings: Sequence[Binding]) -> None:
    """Refuse a weight that trains as two parameters over one memory, with a gradient each.

    Raises:
        ValueError: naming the first.
    """
    for binding in bindings:
        if any(copy.requires_grad for copy in binding.copies):
            raise ValueError(
                f"{binding.name} is one weight held as {1 + len(binding.copies)} parameters over the same memory, each "
                "with a gradient of its own; make them one parameter (second.weight = first.weight) before training"
            )
