"""Replace weights by their best approximations of low rank, in place, and search for the weights to replace.

`svd` keeps the largest singular values (LASER): it is meant to improve a task by removing noise from single matrices.
`output` keeps the directions in which the layer's outputs vary most, and is far better where many weights lose rank.

Source: Sharma et al., LASER, arXiv 2312.13558 (pratyushasharma/laser). Differences: the decomposition is exact, in
    float64; a share too small for rank one gives rank one. `output`: principal components of W x, as in feature-based
    low rank methods, with second moments that are not centred.
Cost: one decomposition per weight. `output` also takes one pass over the batches and I x I numbers in float64 for
    every weight. A search takes one evaluation of the objective for every weight and share.
Limits: shapes stay, so nothing is saved until the factors are stored apart. `output` needs linear layers. Choose by
    one set of data and report on another: the best of many trials flatters itself.

Shapes: O output features, I input features, R rank.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.calibration.walk import Batch
from lightning_prune.statistics.gram import Gram
from lightning_prune.structured.undo import undone_on_error
from lightning_prune.structured.width.reader_repair import feed
from lightning_prune.targets.layouts import Stored, Transposed
from lightning_prune.targets.targets import Binding, Targets, find_blocks, is_linear

__all__ = [
    "Basis",
    "RankEdit",
    "RankReport",
    "RankTrial",
    "factors",
    "rank_of",
    "reduce_rank_",
    "search_rank",
    "trial_table",
]

Basis = Literal["svd", "output"]


@dataclass(frozen=True, kw_only=True)
class RankEdit:
    """Which weights lose rank, and how much of it stays.

    Args:
        weights: pattern over parameter names, for example `*.mlp.down_proj.weight`.
        share: of the smaller side of the weight that stays as rank, in (0, 1]; 1 changes nothing.
        layer: index of the block; None for all.
    """

    weights: str
    share: float
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What became of one weight.

    Args:
        name: of the weight.
        rank: that it has now at most; of every expert where several are stacked.
        full_rank: its smaller side.
        weight_error: norm of the change as a share of the norm of the weight.
        output_error: the same for the layer's outputs on the batches; None without batches.
        num_parameters: of the weight.
        num_factor_parameters: of two factors in its place.
    """

    name: str
    rank: int
    full_rank: int
    weight_error: float
    output_error: float | None
    num_parameters: int
    num_factor_parameters: int


@dataclass(frozen=True, kw_only=True)
class RankTrial:
    """One choice of a search, and the objective it gave; higher is better."""

    edit: RankEdit
    reports: tuple[RankReport, ...]
    objective: float
    gain: float


def rank_of(share: float, full_rank: int) -> int:
    """Return the rank that stays: the share rounded down, at least one.

    Raises:
        ValueError: if the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}; 1 keeps the weight, and nothing at all is no edit")
    return max(1, math.floor(share * full_rank + 1e-9))


def factors(weight_OI: Tensor, rank: int, gram_II: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return left_OR and right_RI in float64, whose product is the best approximation of a rank.

    Args:
        weight_OI: one matrix or a stack of them, in any float dtype.
        rank: of the result.
        gram_II: sum of products of the layer's inputs; the outputs on them are then approximated best, else the
            weight itself.

    Raises:
        ValueError: if the rank or the Gram matrix does not fit.
    """
    rows, cols = weight_OI.shape[-2:]
    if not 1 <= rank <= min(rows, cols):
        raise ValueError(f"the rank of a weight of {rows} x {cols} is from 1 to {min(rows, cols)}, got {rank}")
    if gram_II is not None and (weight_OI.ndim != 2 or gram_II.shape != (cols, cols)):
        raise ValueError(f"a weight of shape {tuple(weight_OI.shape)} does not fit inputs of {tuple(gram_II.shape)}")
    left, right = _Parts(weight_OI, gram_II).at(rank)
    return left, right


class _Parts:
    """A weight decomposed once, from which approximations of all ranks are taken."""

    def __init__(self, weight_OI: Tensor, gram_II: Tensor | None) -> None:
        self.weight_OI = weight_OI.double()
        if gram_II is None:
            left, values, right = torch.linalg.svd(self.weight_OI, full_matrices=False)
            self.left, self.right = left, values[..., None] * right
        else:
            moments_OO = self.weight_OI @ gram_II.to(self.weight_OI) @ self.weight_OI.T
            self.left = torch.linalg.eigh(moments_OO).eigenvectors.flip(1)
            self.right = self.left.T @ self.weight_OI

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        return self.left[..., :rank], self.right[..., :rank, :]


@torch.no_grad()
def reduce_rank_(
    model: nn.Module,
    edits: Sequence[RankEdit],
    *,
    basis: Basis = "svd",
    batches: Sequence[Batch] = (),
    progress: bool = True,
) -> list[RankReport]:
    """Lower the rank of weights in place and report what it did; after an error the model is as it was.

    Args:
        model: whole tensors, unwrapped.
        edits: what loses rank; a weight may be named by one of them only.
        basis: what is approximated best: the weight (`svd`) or the layer's outputs on the batches (`output`).
        batches: calibration data; with `svd` they only serve to report the error of the outputs.
        progress: whether to show a bar.

    Raises:
        ValueError: if an edit names no weight, two name the same, or a weight cannot be approximated.
    """
    chosen = _chosen(model, edits)
    bindings = [binding for binding, _ in chosen]
    grams = _grams(model, bindings, basis, batches, progress=progress)
    new: list[tuple[Binding, Tensor | None, RankReport]] = []
    for binding, edit in chosen:
        gram_II = grams.get(binding.name)
        weight, full_rank = _matrices(binding), _full_rank(binding)
        rank = rank_of(edit.share, full_rank)
        if rank == full_rank:
            new.append((binding, None, _report(binding, weight, None, rank, gram_II)))
            continue
        left, right = _Parts(weight, gram_II if basis == "output" else None).at(rank)
        report = _report(binding, weight, left @ right, rank, gram_II)
        new.append((binding, left @ right, report))
    with undone_on_error(model) as undo:
        for binding, matrices, _ in new:
            if matrices is not None:
                undo.keep(binding.parameter)
                _write(binding, matrices)
    return [report for _, _, report in new]


@torch.no_grad()
def search_rank(
    model: nn.Module,
    objective: Callable[[nn.Module], float],
    *,
    weights: Sequence[str],
    shares: Sequence[float] = (0.5, 0.1, 0.01),
    layers: Iterable[int] | None = None,
    basis: Basis = "svd",
    batches: Sequence[Batch] = (),
    progress: bool = False,
) -> list[RankTrial]:
    """Try every weight and share alone; return the trials, best first. The model is left as it was.

    Args:
        model: whole tensors, unwrapped.
        objective: gives a number for a model, higher is better; it must not change the model.
        weights: patterns over parameter names, each tried in every block.
        shares: of the full rank, each in (0, 1].
        layers: the blocks to try; all of them if not given.
        basis: see `reduce_rank_`.
        batches: calibration data for `output`.
        progress: whether to show a bar.

    Raises:
        ValueError: if a pattern names no weight in any of the blocks, or a share is not in (0, 1].
    """
    if not weights or not shares:
        raise ValueError("a search needs patterns of weights and shares of the rank; got none of one of them")
    for share in shares:
        rank_of(share, 1)
    num_layers = len(find_blocks(model))
    wanted = range(num_layers) if layers is None else list(layers)
    chosen = [(layer, pattern, _in_layer(model, pattern, layer)) for layer in wanted for pattern in weights]
    for pattern in weights:
        if not any(found for _, name, found in chosen if name == pattern):
            raise ValueError(f"{pattern!r} matches no weight of the blocks {list(wanted)}")
    bindings = list({binding.name: binding for _, _, found in chosen for binding in found}.values())
    grams = _grams(model, bindings, basis, batches, progress=progress)
    before = float(objective(model))
    trials = [
        RankTrial(edit=edit, reports=reports, objective=value, gain=value - before)
        for layer, pattern, found in chosen
        if found
        for edit, reports, value in _tried(model, objective, found, layer, pattern, shares, basis, grams)
    ]
    return sorted(trials, key=lambda trial: -trial.objective)


def trial_table(trials: Sequence[RankTrial], *, limit: int = 20) -> str:
    """Return the first trials as a table of text."""
    rows = [("layer", "weights", "share", "rank", "error", "objective", "gain")]
    for trial in trials[:limit]:
        report = trial.reports[0]
        rows.append(
            (
                str(trial.edit.layer),
                trial.edit.weights,
                f"{trial.edit.share:g}",
                f"{report.rank}/{report.full_rank}",
                f"{report.weight_error:.3f}",
                f"{trial.objective:.4f}",
                f"{trial.gain:+.4f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _tried(
    model: nn.Module,
    objective: Callable[[nn.Module], float],
    found: Sequence[Binding],
    layer: int,
    pattern: str,
    shares: Sequence[float],
    basis: Basis,
    grams: dict[str, Tensor],
) -> Iterator[tuple[RankEdit, tuple[RankReport, ...], float]]:
    """Yield the edits of one pattern in one block with what they give, and put the weights back."""
    weights = {binding.name: _matrices(binding) for binding in found}
    saved = {binding.name: binding.parameter.detach().clone() for binding in found}
    parts = {name: _Parts(weight, grams.get(name) if basis == "output" else None) for name, weight in weights.items()}
    for share in shares:
        reports = []
        try:
            for binding in found:
                rank, name = rank_of(share, _full_rank(binding)), binding.name
                left, right = parts[name].at(rank)
                new = None if rank == _full_rank(binding) else left @ right
                reports.append(_report(binding, weights[name], new, rank, grams.get(name)))
                if new is not None:
                    _write(binding, new)
            value = float(objective(model))
        finally:
            for binding in found:
                binding.parameter.data.copy_(saved[binding.name])
        yield RankEdit(weights=pattern, share=share, layer=layer), tuple(reports), value


def _chosen(model: nn.Module, edits: Sequence[RankEdit]) -> list[tuple[Binding, RankEdit]]:
    """Return the weights with the edit of each."""
    if not edits:
        raise ValueError("no edit was given; name weights and the share of their rank that stays")
    result: dict[str, tuple[Binding, RankEdit]] = {}
    for edit in edits:
        rank_of(edit.share, 1)
        found = _in_layer(model, edit.weights, edit.layer)
        if not found:
            raise ValueError(
                f"{edit.weights!r} matches no weight of block {edit.layer}; the model has blocks 0 to "
                f"{len(find_blocks(model)) - 1}"
            )
        for binding in found:
            if binding.name in result:
                raise ValueError(f"{binding.name} is named by two edits; give each weight one share")
            result[binding.name] = binding, edit
    return list(result.values())


def _in_layer(model: nn.Module, pattern: str, layer: int | None) -> list[Binding]:
    """Return the weights that a pattern names, of one block or of all the model."""
    found = Targets(include=(pattern,)).resolve(model)
    for binding in found:
        if distributed.is_sharded(binding.parameter):
            raise ValueError(f"{binding.name} is sharded; lower its rank before fully_shard, then shard")
        if binding.source is not None:
            raise ValueError(f"{binding.name} is only a part of a weight; remove the weight norm to lower its rank")
    if layer is None:
        return found
    blocks = find_blocks(model)
    own = {id(module) for module in blocks[layer].modules()} if 0 <= layer < len(blocks) else set()
    return [binding for binding in found if id(binding.module) in own]


def _grams(
    model: nn.Module, bindings: Sequence[Binding], basis: Basis, batches: Sequence[Batch], *, progress: bool
) -> dict[str, Tensor]:
    """Return weight -> gram_II of its layer's inputs, for linear layers; empty without batches."""
    if basis not in get_args(Basis):
        raise ValueError(f"basis must be svd or output, got {basis!r}")
    if basis == "output" and not batches:
        raise ValueError("basis='output' approximates the outputs on calibration batches, got none; pass batches")
    for binding in bindings:
        if basis == "output" and not is_linear(binding.module):
            raise ValueError(f"{binding.name} belongs to no linear layer, whose inputs could be seen; use basis='svd'")
    feeds = [(b, Gram(b.parameter.detach(), b.shape_OI[1])) for b in bindings if is_linear(b.module)]
    if not batches or not feeds:
        return {}
    feed(model, feeds, batches, title="observing inputs", progress=progress)
    return {binding.name: gram.compute()[:-1, :-1] for binding, gram in feeds}


def _is_stack(binding: Binding) -> bool:
    return binding.parameter.ndim == 3 and isinstance(binding.layout, Stored | Transposed)


def _matrices(binding: Binding) -> Tensor:
    """Return weight_OI in float64; (E, O, I) for stacked experts, as they lie."""
    if _is_stack(binding):
        return binding.parameter.detach().double()
    return binding.to_matrix(binding.parameter.detach()).double()


def _full_rank(binding: Binding) -> int:
    return min(_matrices(binding).shape[-2:])


def _write(binding: Binding, matrices: Tensor) -> None:
    binding.parameter.data.copy_(matrices if _is_stack(binding) else binding.from_matrix(matrices))


def _report(
    binding: Binding, weight: Tensor, approximation: Tensor | None, rank: int, gram_II: Tensor | None
) -> RankReport:
    change = torch.zeros_like(weight) if approximation is None else weight - approximation
    output_error = None
    if gram_II is not None:
        gram_II = gram_II.to(weight)
        output_error = math.sqrt(max(0.0, _energy(change, gram_II) / max(_energy(weight, gram_II), 1e-300)))
    rows, cols = weight.shape[-2:]
    num_matrices = weight.shape[:-2].numel()
    return RankReport(
        name=binding.name,
        rank=rank,
        full_rank=min(rows, cols),
        weight_error=float(change.norm() / weight.norm().clamp(min=1e-300)),
        output_error=output_error,
        num_parameters=weight.numel(),
        num_factor_parameters=num_matrices * rank * (rows + cols),
    )


def _energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    return float(((weight_OI @ gram_II) * weight_OI).sum())
