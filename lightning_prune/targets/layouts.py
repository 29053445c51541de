"""How a stored weight is read as a matrix: one row per output feature, columns in the order of its inputs.

Shapes: O rows (output features), I columns (input features), E experts, K positions of a kernel, G groups of a
convolution. The columns of a convolution run over the input channels at one position of the kernel, then over those
at the next, so that neighbours in a row are neighbouring channels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Form", "Kernel", "Layout", "Stored", "Transposed", "TransposedKernel"]


class Layout(ABC):
    """The order in which a weight is stored; `shape` is always that of the whole parameter.

    `is_certain` says whether inputs and outputs can be told apart, `is_by_rows` whether the first dimension of the
    parameter counts rows, so that a process that holds some of them holds whole rows.
    """

    title: str
    is_certain = True
    is_by_rows = True

    @abstractmethod
    def shape_OI(self, shape: torch.Size) -> tuple[int, int]:
        """Return rows and columns."""

    @abstractmethod
    def to_matrix(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Read a tensor shaped like the parameter, or some of its first rows, as (O, I)."""

    @abstractmethod
    def from_matrix(self, matrix_OI: Tensor, shape: torch.Size) -> Tensor:
        """Undo `to_matrix`."""

    def num_taps(self, shape: torch.Size) -> int:
        """Return how often the input channels repeat along the columns: the positions of a kernel, else 1."""
        return 1

    @property
    def num_groups(self) -> int:
        """Return into how many parts the rows fall that read inputs of their own."""
        return 1


@dataclass(frozen=True)
class Stored(Layout):
    """Outputs before inputs: (O, I), or a stack (E, O, I) read as E * O rows."""

    is_certain: bool = True
    title = "(out, in)"

    def shape_OI(self, shape: torch.Size) -> tuple[int, int]:
        """Return rows and columns."""
        return shape[:-1].numel(), shape[-1]

    def to_matrix(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Read a tensor shaped like the parameter, or some of its first rows, as (O, I)."""
        return tensor.reshape(-1, shape[-1])

    def from_matrix(self, matrix_OI: Tensor, shape: torch.Size) -> Tensor:
        """Undo `to_matrix`."""
        return matrix_OI.reshape(-1, *shape[1:])


@dataclass(frozen=True)
class Transposed(Layout):
    """Inputs before outputs: (I, O), or a stack (E, I, O) read as E * O rows."""

    is_stack: bool = False
    title = "(in, out)"

    @property
    def is_by_rows(self) -> bool:  # type: ignore[override]
        """Return whether the first dimension counts rows: that of experts does."""
        return self.is_stack

    def shape_OI(self, shape: torch.Size) -> tuple[int, int]:
        """Return rows and columns."""
        return shape[:-2].numel() * shape[-1], shape[-2]

    def to_matrix(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Read a tensor shaped like the parameter, or some of its first rows, as (O, I)."""
        return tensor.transpose(-1, -2).reshape(-1, shape[-2])

    def from_matrix(self, matrix_OI: Tensor, shape: torch.Size) -> Tensor:
        """Undo `to_matrix`."""
        stacked = matrix_OI.reshape(-1, *shape[1:-2], shape[-1], shape[-2]) if len(shape) > 2 else matrix_OI
        return stacked.transpose(-1, -2).contiguous()


@dataclass(frozen=True)
class _Taps(Layout):
    """What kernels of both directions have: groups, and positions behind two dimensions of channels."""

    groups: int = 1

    @property
    def num_groups(self) -> int:
        """Return into how many parts the rows fall that read inputs of their own."""
        return self.groups

    def num_taps(self, shape: torch.Size) -> int:
        """Return the positions of the kernel."""
        return shape[2:].numel()


@dataclass(frozen=True)
class Kernel(_Taps):
    """A convolution: (O, I / G, kernel ...), one row per output channel."""

    title = "(out, in, kernel)"

    def shape_OI(self, shape: torch.Size) -> tuple[int, int]:
        """Return rows and columns."""
        return shape[0], shape[1:].numel()

    def to_matrix(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Read a tensor shaped like the parameter, or some of its first rows, as (O, K * I)."""
        return tensor.reshape(-1, shape[1], self.num_taps(shape)).transpose(1, 2).reshape(-1, shape[1:].numel())

    def from_matrix(self, matrix_OI: Tensor, shape: torch.Size) -> Tensor:
        """Undo `to_matrix`."""
        kernel_OKI = matrix_OI.reshape(-1, self.num_taps(shape), shape[1])
        return kernel_OKI.transpose(1, 2).reshape(-1, *shape[1:]).contiguous()


@dataclass(frozen=True)
class TransposedKernel(_Taps):
    """A transposed convolution: (I, O / G, kernel ...), one row per output channel."""

    title = "(in, out, kernel)"
    is_by_rows = False

    def shape_OI(self, shape: torch.Size) -> tuple[int, int]:
        """Return rows and columns."""
        return self.groups * shape[1], shape[0] // self.groups * self.num_taps(shape)

    def to_matrix(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Read a tensor shaped like the parameter as (O, K * I)."""
        kernel_GIOK = tensor.reshape(self.groups, shape[0] // self.groups, shape[1], self.num_taps(shape))
        return kernel_GIOK.permute(0, 2, 3, 1).reshape(self.shape_OI(shape))

    def from_matrix(self, matrix_OI: Tensor, shape: torch.Size) -> Tensor:
        """Undo `to_matrix`."""
        kernel_GOKI = matrix_OI.reshape(self.groups, shape[1], self.num_taps(shape), shape[0] // self.groups)
        return kernel_GOKI.permute(0, 3, 1, 2).reshape(shape).contiguous()


@dataclass(frozen=True)
class Form(Layout):
    """A bilinear form: (O, I1, I2), one row of I1 * I2 products per output."""

    title = "(out, in, in)"

    def num_taps(self, shape: torch.Size) -> int:
        """Return the features of the first input: the second's repeat for each of them."""
        return shape[1]

    def shape_OI(self, shape: torch.Size) -> tuple[int, int]:
        """Return rows and columns."""
        return shape[0], shape[1:].numel()

    def to_matrix(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Read a tensor shaped like the parameter, or some of its first rows, as (O, I)."""
        return tensor.reshape(-1, shape[1:].numel())

    def from_matrix(self, matrix_OI: Tensor, shape: torch.Size) -> Tensor:
        """Undo `to_matrix`."""
        return matrix_OI.reshape(-1, *shape[1:])
