"""Choose the units to remove by the error of the layer's output, before or after the kept weights are refitted.

Units are runs of input columns: one column per feed-forward unit, one head size per attention head. `output_energy`
asks what a unit contributes; `greedy_units` asks what is lost after the others have taken up what they can, and
removes the cheapest one after another, so that of two twins only one goes.

Source: Hassibi and Stork, Optimal Brain Surgeon, NeurIPS 1992, with the Schur complement for blocks of columns; the
    use on units follows Greedy Output Approximation, arXiv 2407.19126, and ZipLM, arXiv 2302.04089, algorithm 1.
    Difference: candidates are drawn in pools, within which the order is exactly greedy.
Cost: one inverse of I x I in float64, and one update of it per batch of removed units.
Limits: sees one layer's output; the Gram matrix must rest on many tokens.

Shapes: O output features, I input features, U units of S columns each.
"""

from abc import ABC
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GreedyOutput", "OutputChooser", "OutputEnergy", "greedy_units", "output_energy"]


class OutputChooser(ABC):  # noqa: B024 - the functions below are told apart by the class of their options
    """Options of a way to choose units by the error of a layer's output."""


@dataclass(frozen=True, kw_only=True)
class OutputEnergy(OutputChooser):
    """Choose units by what each one alone contributes to the output; see the module text."""


@dataclass(frozen=True, kw_only=True)
class GreedyOutput(OutputChooser):
    """Choose units by what is lost after a refit, greedily; see the module text.

    Args:
        batch: units removed between two updates of the whole inverse. Default: 16, in our measurement as good as one
            by one.
        damping: > 0, in units of the mean of the Gram matrix's diagonal.
    """

    batch: int = 16
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if self.batch < 1 or self.damping <= 0:
            raise ValueError(f"batch must be >= 1 and damping > 0, got {self.batch} and {self.damping}")


def output_energy(weight_OI: Tensor, gram_II: Tensor, *, size: int = 1) -> Tensor:
    """Return cost_U, float64: the squared output that each unit alone contributes, tr(W_u G_uu W_u^T).

    Args:
        weight_OI: weights in any float dtype.
        gram_II: sum of products of the inputs.
        size: columns per unit.

    Raises:
        ValueError: if units do not tile the columns or the shapes disagree.
    """
    num_units = _count(weight_OI, gram_II, size)
    weight_UOS = _by_unit(weight_OI.double(), size)
    blocks_USS = _diagonal_blocks(gram_II.double(), torch.arange(num_units, device=gram_II.device), size)
    return torch.einsum("uos,ust,uot->u", weight_UOS, blocks_USS, weight_UOS)


def greedy_units(
    weight_OI: Tensor, gram_II: Tensor, num_remove: int, options: GreedyOutput, *, size: int = 1, num_parts: int = 1
) -> list[int]:
    """Return the units to remove, cheapest first; equally many in each part.

    Args:
        weight_OI: weights in any float dtype; the arithmetic is float64.
        gram_II: sum of products of the inputs.
        num_remove: how many units go.
        options: batch and damping.
        size: columns per unit.
        num_parts: units come in so many equal runs, and equally many go from each.

    Raises:
        ValueError: if units do not tile the columns, or so many cannot go from equal parts.
    """
    num_units = _count(weight_OI, gram_II, size)
    if num_remove % num_parts or not 0 <= num_remove < num_units:
        raise ValueError(
            f"cannot remove {num_remove} of {num_units} units in {num_parts} equal parts; give a multiple of "
            f"{num_parts} that leaves something"
        )
    state = _State(_inverse(gram_II.to(weight_OI.device), options.damping), weight_OI.double().clone(), size)
    quota = [num_remove // num_parts] * num_parts
    part_of = [unit * num_parts // num_units for unit in range(num_units)]
    left = list(range(num_units))
    removed: list[int] = []
    while len(removed) < num_remove:
        candidates = [unit for unit in left if quota[part_of[unit]]]
        order = state.costs(candidates).argsort(stable=True).tolist()
        pool = [candidates[index] for index in order[: 2 * options.batch]]
        chosen = _greedy_within(state.only(pool), pool, part_of, quota, min(options.batch, num_remove - len(removed)))
        state.remove(chosen)
        removed += chosen
        left = sorted(set(left) - set(chosen))
    return removed


class _State:
    """The inverse of the Gram matrix and the refitted weights of what is left; what was removed is zero."""

    def __init__(self, inverse_II: Tensor, weight_OI: Tensor, size: int) -> None:
        self.inverse_II, self.weight_OI, self.size = inverse_II, weight_OI, size

    def _columns(self, units: list[int]) -> Tensor:
        units_U = torch.tensor(units, device=self.weight_OI.device)
        return (units_U[:, None] * self.size + torch.arange(self.size, device=units_U.device)).flatten()

    def costs(self, units: list[int]) -> Tensor:
        """Return cost_U of removing each unit next, after the refit: tr(W_u (inverse_uu)^-1 W_u^T)."""
        units_U = torch.tensor(units, device=self.weight_OI.device)
        weight_UOS = _by_unit(self.weight_OI[:, self._columns(units)], self.size)
        blocks_USS = _diagonal_blocks(self.inverse_II, units_U, self.size)
        return (weight_UOS * torch.linalg.solve(blocks_USS, weight_UOS.mT).mT).sum((1, 2))

    def only(self, units: list[int]) -> "_State":
        """Return the state restricted to some units; removing them in it is exact for them."""
        columns = self._columns(units)
        return _State(self.inverse_II[columns][:, columns], self.weight_OI[:, columns], self.size)

    def remove(self, units: list[int]) -> None:
        """Remove units and refit the rest, by the Schur complement."""
        columns = self._columns(units)
        rows_PI = torch.linalg.solve(self.inverse_II[columns][:, columns], self.inverse_II[columns])
        self.weight_OI -= self.weight_OI[:, columns] @ rows_PI
        self.inverse_II -= self.inverse_II[:, columns] @ rows_PI
        self.weight_OI[:, columns] = 0
        self.inverse_II[columns] = 0
        self.inverse_II[:, columns] = 0


def _greedy_within(pool_state: _State, pool: list[int], part_of: list[int], quota: list[int], num: int) -> list[int]:
    """Return up to `num` units of a pool in greedy order; counts down `quota`, the units still to go per part."""
    places = list(range(len(pool)))
    chosen: list[int] = []
    while len(chosen) < num:
        places = [place for place in places if quota[part_of[pool[place]]]]
        if not places:
            break
        best = places.pop(int(pool_state.costs(places).argmin()))
        pool_state.remove([best])
        chosen.append(pool[best])
        quota[part_of[pool[best]]] -= 1
    return chosen


def _inverse(gram_II: Tensor, damping: float) -> Tensor:
    damped = gram_II.double().clone()
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp(min=1e-30))
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        raise ValueError(
            f"the Gram matrix of the inputs is not positive definite with damping {damping}; raise it, and check the "
            "model and the calibration batches for NaN and infinity"
        )
    return torch.cholesky_inverse(factor)


def _by_unit(weight_OI: Tensor, size: int) -> Tensor:
    return weight_OI.reshape(len(weight_OI), -1, size).transpose(0, 1)


def _diagonal_blocks(matrix_II: Tensor, units_U: Tensor, size: int) -> Tensor:
    columns_US = units_U[:, None] * size + torch.arange(size, device=units_U.device)
    return matrix_II[columns_US[:, :, None], columns_US[:, None, :]]


def _count(weight_OI: Tensor, gram_II: Tensor, size: int) -> int:
    num_inputs = weight_OI.shape[1]
    if gram_II.shape != (num_inputs, num_inputs) or num_inputs % size:
        raise ValueError(
            f"{num_inputs} input columns, a Gram matrix of shape {tuple(gram_II.shape)} and units of {size} columns do "
            "not fit together; collect the Gram matrix from the layer that owns the weight"
        )
    return num_inputs // size
