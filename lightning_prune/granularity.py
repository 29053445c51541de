"""The shape of a hole: single weights, N of every M, blocks, or whole input channels.

Shapes: O rows, I columns of the weight; R x C units, one row of units per group that is ranked together under scope
`row`.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.base.types import Granularity, Scope

__all__ = ["NM", "Block", "Channel", "Unstructured", "num_kept"]


def num_kept(sparsity: float, num_units: int) -> int:
    """Return how many of `num_units` stay when floor(sparsity * num_units) are pruned.

    The product is rounded to a millionth first, so that 0.29 of 100 is 29 and not 28.
    """
    return num_units - int(sparsity * num_units + 1e-6)


@dataclass(frozen=True)
class Unstructured(Granularity):
    """Single weights."""

    has_direction: ClassVar[bool] = False

    @property
    def rows_per_unit(self) -> int:
        """Return how many rows of the weight one unit spans."""
        return 1

    def check(self, name: str, shape_OI: tuple[int, int], *, num_taps: int = 1, num_groups: int = 1) -> None:
        """Accept every shape."""

    def pool(self, score_OI: Tensor) -> Tensor:
        """Return the scores unchanged: every weight is a unit."""
        return score_OI

    def expand(self, keep_RC: Tensor, shape_OI: tuple[int, int]) -> Tensor:
        """Return the mask unchanged."""
        return keep_RC

    def scope(self, preferred: Scope) -> Scope:
        """Return the units ranked together: the scorer's choice."""
        return preferred

    def num_keep(self, sparsity: float, num_units: int) -> int:
        """Return how many of the units ranked together stay."""
        return num_kept(sparsity, num_units)

    def check_sparsity(self, sparsity: float) -> None:
        """Accept every sparsity."""


@dataclass(frozen=True, kw_only=True)
class NM(Unstructured):
    """Keep N weights of every M consecutive ones along the input dimension.

    Of a convolution these are M consecutive input channels at one position of the kernel, as sparse kernels need them.
    On a ramp N falls from M to its final value. Units are ranked within their M, whatever the scorer's scope.
    """

    has_direction: ClassVar[bool] = True

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"N:M keeps n of every m weights, so 0 < n < m is needed, got n={self.n}, m={self.m}; "
                "2:4 is n=2, m=4 and 75 % sparsity is n=1, m=4"
            )

    def check(self, name: str, shape_OI: tuple[int, int], *, num_taps: int = 1, num_groups: int = 1) -> None:
        """Check that M divides the input dimension, of a convolution its input channels in each group.

        Raises:
            ValueError: if it does not.
        """
        num_channels = shape_OI[1] // num_taps
        if num_channels % self.m and (num_taps > 1 or num_groups > 1):
            raise ValueError(
                f"{self.n}:{self.m} runs along the input channels at each position of a kernel, so {self.m} must "
                f"divide their number; {name} has {num_channels} in each of {num_groups} groups; exclude it from "
                f"the targets (exclude: {name!r}) or choose another m"
            )
        if num_channels % self.m:
            raise ValueError(
                f"{self.n}:{self.m} needs an input dimension that {self.m} divides; {name} has {shape_OI[1]}; "
                "exclude it from the targets or choose another m"
            )

    def pool(self, score_OI: Tensor) -> Tensor:
        """Return one row of M units per group."""
        return score_OI.reshape(-1, self.m)

    def expand(self, keep_RC: Tensor, shape_OI: tuple[int, int]) -> Tensor:
        """Return the mask in the shape of the weight."""
        return keep_RC.reshape(shape_OI)

    def scope(self, preferred: Scope) -> Scope:
        """Return `row`, which here is the group of M.

        Raises:
            ValueError: if the scorer asks for a global ranking, which N:M cannot honour.
        """
        if preferred == "global":
            raise ValueError("scope: global has no effect under N:M, where weights compete within their M; use row")
        return "row"

    def num_keep(self, sparsity: float, num_units: int) -> int:
        """Return how many of every M stay: the nearest whole number, never below N."""
        return max(self.n, num_units - int(sparsity * num_units + 0.5))

    def check_sparsity(self, sparsity: float) -> None:
        """Check that the final sparsity is the one the pattern means.

        Raises:
            ValueError: if it is not.
        """
        if abs(sparsity - (1 - self.n / self.m)) > 1e-9:
            raise ValueError(
                f"{self.n}:{self.m} means a final sparsity of {1 - self.n / self.m:g}, the schedule says {sparsity:g}; "
                "set schedule.sparsity to it"
            )


@dataclass(frozen=True, kw_only=True)
class Block(Granularity):
    """Rectangles of rows x cols weights, kept or pruned whole; a block's score is the mean of its weights' scores.

    Of a convolution the columns of a block are input channels at one position of the kernel.
    """

    rows: int = 4
    cols: int = 4

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.rows * self.cols == 1:
            raise ValueError(
                f"a block needs rows >= 1 and cols >= 1 and more than one weight, got {self.rows} x {self.cols}; "
                "for single weights use Unstructured"
            )

    @property
    def rows_per_unit(self) -> int:
        """Return how many rows of the weight one unit spans."""
        return self.rows

    def check(self, name: str, shape_OI: tuple[int, int], *, num_taps: int = 1, num_groups: int = 1) -> None:
        """Check that blocks tile the weight.

        Raises:
            ValueError: if they do not.
        """
        if shape_OI[0] // num_groups % self.rows or shape_OI[1] // num_taps % self.cols:
            raise ValueError(
                f"blocks of {self.rows} x {self.cols} do not tile {name} of shape "
                f"{shape_OI[0] // num_groups} x {shape_OI[1] // num_taps}; choose sizes that divide both, or exclude "
                "it from the targets"
            )

    def pool(self, score_OI: Tensor) -> Tensor:
        """Return the mean score of every block."""
        blocks = score_OI.reshape(-1, self.rows, score_OI.shape[1] // self.cols, self.cols)
        return blocks.mean(dim=(1, 3))

    def expand(self, keep_RC: Tensor, shape_OI: tuple[int, int]) -> Tensor:
        """Return the mask in the shape of the weight."""
        return torch.repeat_interleave(torch.repeat_interleave(keep_RC, self.rows, 0), self.cols, 1)

    def scope(self, preferred: Scope) -> Scope:
        """Return the units ranked together: the scorer's choice."""
        return preferred

    def num_keep(self, sparsity: float, num_units: int) -> int:
        """Return how many of the units ranked together stay."""
        return num_kept(sparsity, num_units)

    def check_sparsity(self, sparsity: float) -> None:
        """Accept every sparsity."""


@dataclass(frozen=True, kw_only=True)
class Channel(Granularity):
    """Whole groups of `width` consecutive input columns, over all rows; scored by the mean of their weights' scores.

    On an output projection a column is a unit of what feeds it: width 1 on a feed-forward down projection masks its
    units, the head size on an attention output projection masks heads.
    """

    width: int = 1

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"a channel needs width >= 1, got {self.width}; 1 is a single input column")

    @property
    def rows_per_unit(self) -> int:
        """Return a number above 1: a unit spans all rows, however many there are."""
        return sys.maxsize

    def check(self, name: str, shape_OI: tuple[int, int], *, num_taps: int = 1, num_groups: int = 1) -> None:
        """Check that channels tile the weight, and that a column is one input.

        Raises:
            ValueError: if they do not.
        """
        if num_taps > 1 or num_groups > 1:
            raise ValueError(
                f"a channel is a whole column of a weight, but {name} reads each input at {num_taps} positions of a "
                f"kernel and in {num_groups} groups; exclude it from the targets (exclude: {name!r}) or choose another "
                "granularity"
            )
        if shape_OI[1] % self.width:
            raise ValueError(
                f"channels of width {self.width} do not tile {name} with its {shape_OI[1]} input columns; "
                "choose a width that divides it, or exclude it from the targets"
            )

    def pool(self, score_OI: Tensor) -> Tensor:
        """Return the mean score of every group of columns, in one row."""
        return score_OI.mean(dim=0).reshape(1, -1, self.width).mean(dim=2)

    def expand(self, keep_RC: Tensor, shape_OI: tuple[int, int]) -> Tensor:
        """Return the mask in the shape of the weight."""
        return torch.repeat_interleave(keep_RC, self.width, 1).repeat(shape_OI[0], 1)

    def scope(self, preferred: Scope) -> Scope:
        """Return `global` where the scorer asks for it, else `tensor`: a channel has no row to be ranked in."""
        return "global" if preferred == "global" else "tensor"

    def num_keep(self, sparsity: float, num_units: int) -> int:
        """Return how many of the units ranked together stay."""
        return num_kept(sparsity, num_units)

    def check_sparsity(self, sparsity: float) -> None:
        """Accept every sparsity."""
