"""Let weak blocks compute with the matrices of others, plus low-rank differences: fewer stored parameters.

The blocks with the lowest block influence give up their matrices. Each takes those of the kept block from which it
differs by what a matrix of small rank holds best, and starts with that difference. What it adds to the residual stream
is brought back to the mean and spread, per feature, that the original block gave on calibration data; or as near to
its values as a scale and a shift can bring it.

Source: FlexiGPT, arXiv 2501.14713. The paper names the three ingredients; the formulas of the donor metric and of the
    normalisation, and its least-squares form, are ours.
Cost: one pass for block influence; an eigenvalue problem per linear layer, replaced block and kept block; one singular
    value decomposition per replaced layer; two passes per replaced block for its normalisation.
Limits: memory and disk shrink, time does not: every block is still computed. Blocks of one kind with linear layers of
    equal shapes. The result has per-layer entries (`share_with`) that no stock class knows.

Shapes: N tokens that are not padding, D width of the residual stream, O outputs, I inputs, R rank.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.build import check_whole
from lightning_prune.structured.depth.alike import check_alike, linear_roles, rank_limits, weight_of
from lightning_prune.structured.depth.influence import block_influence, block_streams
from lightning_prune.structured.depth.planning import check_no_state_file, check_number, make_plan
from lightning_prune.structured.depth.shared_block import SharedLinear, UpdateNorm, share_block
from lightning_prune.structured.groups import Fit, Plan, Share
from lightning_prune.structured.method import Batch, StateFile, StructuredMethod
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.undo import Undo, undone_on_error
from lightning_prune.targets.targets import find_blocks

__all__ = [
    "FlexiGPT",
    "check_shares",
    "donor_residual",
    "low_rank_difference",
    "materialised",
    "normalise_updates",
    "set_factors",
    "share_blocks",
    "shared_factors",
]


def donor_residual(weight_OI: Tensor, donor_OI: Tensor, rank: int) -> float:
    """Return the squared error of the best difference of a rank, relative to the squared norm of the weight."""
    difference_OI = weight_OI.double() - donor_OI.double()
    if rank >= min(difference_OI.shape):
        return 0.0
    tall = difference_OI if difference_OI.shape[0] >= difference_OI.shape[1] else difference_OI.T
    squares = torch.linalg.eigvalsh(tall.T @ tall)  # of the singular values, ascending
    return float(squares[:-rank].clamp_min(0).sum() / weight_OI.double().square().sum())


def low_rank_difference(weight_OI: Tensor, donor_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (O, R) and A (R, I) in float64, whose product is nearest to the difference.

    R is the smaller dimension at most. Both carry the square roots of the singular values and are of the same size.
    """
    rank = min(rank, *weight_OI.shape)
    u_OK, values_K, v_KI = torch.linalg.svd(weight_OI.double() - donor_OI.double(), full_matrices=False)
    roots_R = values_K[:rank].sqrt()
    return u_OK[:, :rank] * roots_R, roots_R[:, None] * v_KI[:rank]


def check_shares(model: nn.Module, shares: Sequence[Share]) -> None:
    """Check that blocks can share in this way.

    Raises:
        ValueError: if a block does not exist, shares twice or with one that gives up its own matrices, or the rank is
            larger than any layer allows.
    """
    total = len(find_blocks(model))
    layers = [share.layer for share in shares]
    for share in shares:
        if not (0 <= share.layer < total and 0 <= share.donor < total) or layers.count(share.layer) > 1:
            raise ValueError(f"blocks 0 to {total - 1} can share, each once; got {share}")
        if share.donor in layers:
            raise ValueError(f"block {share.donor} gives up its own matrices, so it cannot lend them; got {share}")
    check_alike(model)
    largest = max(rank_limits(model).values())
    for share in shares:
        if not 1 <= share.rank <= largest:
            raise ValueError(f"rank must be between 1 and {largest}, the full rank of the layers, got {share.rank}")


def shared_factors(model: nn.Module, share: Share) -> dict[str, tuple[Tensor, Tensor]]:
    """Return linear layer of the block -> its B and A, float64, from the weights the two blocks have now."""
    blocks = find_blocks(model)
    own, donors = linear_roles(blocks[share.layer]), linear_roles(blocks[share.donor])
    return {
        name: low_rank_difference(weight_of(layer).detach(), weight_of(donors[name]).detach(), share.rank)
        for name, layer in own.items()
    }


@torch.no_grad()
def share_blocks(model: nn.Module, shares: Sequence[Share], *, width: int) -> None:
    """Let blocks share in place; they start from the best differences.

    Args:
        model: any model of equal blocks; it keeps its class, whose `from_pretrained` would not know the result.
        shares: which block takes the matrices of which.
        width: of the residual stream.

    Raises:
        ValueError: if they cannot; nothing was changed.
    """
    check_whole(model)
    check_shares(model, shares)
    factors = [shared_factors(model, share) for share in shares]
    blocks = find_blocks(model)
    with undone_on_error(model):
        for share, found in zip(shares, factors, strict=True):
            share_block(blocks[share.layer], blocks[share.donor], share.rank, width=width, names=list(found))
            set_factors(blocks[share.layer], found)


@torch.no_grad()
def set_factors(block: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write factors into the linear layers of a block that shares."""
    for name, (b_OR, a_RI) in factors.items():
        layer = block.get_submodule(name)
        assert isinstance(layer, SharedLinear)
        layer.factor_b.copy_(b_OR)
        layer.factor_a.copy_(a_RI)


@contextmanager
def materialised(model: nn.Module, shares: Sequence[Share]) -> Iterator[None]:
    """Give replaced blocks plain matrices equal to what they will compute with; the old ones come back afterwards."""
    blocks = find_blocks(model)
    backups: list[tuple[Tensor, Tensor]] = []
    try:
        for share in shares:
            factors = shared_factors(model, share)
            own, donors = linear_roles(blocks[share.layer]), linear_roles(blocks[share.donor])
            for name, (b_OR, a_RI) in factors.items():
                weight_OI = weight_of(own[name]).data
                backups.append((weight_OI, weight_OI.clone()))
                weight_OI.copy_(weight_of(donors[name]).data.double() + b_OR @ a_RI)
        yield
    finally:
        for weight_OI, before_OI in backups:
            weight_OI.copy_(before_OI)


@dataclass(frozen=True)
class _Moments:
    """Means, variances and covariance of what a block adds, per feature, in the shared and in the dense model."""

    shared_D: Tensor
    dense_D: Tensor
    shared_variance_D: Tensor
    dense_variance_D: Tensor
    covariance_D: Tensor

    def affine(self, fit: Fit) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the shared update; a feature that never changes is only shifted."""
        is_constant_D = self.shared_variance_D <= 0
        variance_D = self.shared_variance_D.masked_fill(is_constant_D, 1.0)
        if fit == "least_squares":
            scale_D = self.covariance_D / variance_D
        else:
            scale_D = (self.dense_variance_D / variance_D).sqrt()
        scale_D = scale_D.masked_fill(is_constant_D, 1.0)
        return scale_D, self.dense_D - scale_D * self.shared_D


def _moments(shared: nn.Module, dense: nn.Module, batches: Sequence[Batch], layer: int) -> _Moments:
    """Measure the updates of one block over all tokens that are not padding, of all processes."""
    totals: list[Tensor] = []
    with evaluating(shared), evaluating(dense), torch.no_grad():
        for batch in batches:
            x_ND, y_ND = (_update(model, batch, layer) for model in (shared, dense))
            rows = [torch.ones_like(x_ND), x_ND, y_ND, x_ND.square(), y_ND.square(), x_ND * y_ND]
            totals.append(torch.stack([row_ND.sum(0) for row_ND in rows]))
    if not totals:
        raise ValueError("got no calibration batches; give a list with at least one")
    number_D, *sums = distributed.sum_everywhere(torch.stack(totals).sum(0))
    x_D, y_D, xx_D, yy_D, xy_D = (sum_D / number_D for sum_D in sums)
    return _Moments(x_D, y_D, (xx_D - x_D.square()).clamp_min(0), (yy_D - y_D.square()).clamp_min(0), xy_D - x_D * y_D)


def _update(model: nn.Module, batch: Batch, layer: int) -> Tensor:
    inputs, outputs, mask_BT = block_streams(model, batch)
    return outputs[layer][mask_BT].double() - inputs[layer][mask_BT].double()


@torch.no_grad()
def normalise_updates(shared: nn.Module, dense: nn.Module, shares: Sequence[Share], batches: Sequence[Batch]) -> None:
    """Scale and shift what the replaced blocks add, to restore what their `fit` says of the original blocks.

    Blocks are taken in order, each measured on the stream that those before it give by then.

    Args:
        shared: the model whose blocks share; its normalisations are set.
        dense: the original model.
        shares: of the shared model.
        batches: calibration data; `attention_mask` leaves out padding.
    """
    with undone_on_error(shared) as undo:
        for share in sorted(shares, key=lambda share: share.layer):
            _normalise_update(shared, dense, share, batches, undo)


def _normalise_update(shared: nn.Module, dense: nn.Module, share: Share, batches: Sequence[Batch], undo: Undo) -> None:
    norm = find_blocks(shared)[share.layer].update_norm
    assert isinstance(norm, UpdateNorm)
    undo.keep(norm.scale)
    undo.keep(norm.shift)
    norm.scale.fill_(1)
    norm.shift.fill_(0)
    scale_D, shift_D = _moments(shared, dense, batches, share.layer).affine(share.fit)
    norm.scale.copy_(scale_D)
    norm.shift.copy_(shift_D)


@dataclass(frozen=True, kw_only=True)
class FlexiGPT(StructuredMethod):
    """Let the blocks with the lowest block influence share the matrices of others; see the module text.

    Args:
        num_blocks: how many give up their matrices.
        rank: of the differences that they keep; layers of smaller dimensions keep theirs whole.
        fit: what their normalisation restores: `moments` the mean and spread of each feature, as in the paper;
            `least_squares` the values themselves, which all but mutes a donor that gives something unrelated.
    """

    num_blocks: int
    rank: int = 16
    fit: Fit = "moments"

    def __post_init__(self) -> None:
        at_least(1, num_blocks=self.num_blocks, rank=self.rank)

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Choose blocks by their influence, and for each the donor with the smallest residual.

        Args:
            model: not changed.
            structure: not used: no shape is cut.
            batches: for block influence; the export measures the normalisation on the same.
            state_file: must be None.
            progress: whether to show a bar over replaced blocks and donors.

        Raises:
            ValueError: if the options or the model do not fit.
        """
        check_no_state_file(self, state_file)
        check_number(model, self.num_blocks)
        check_whole(model)
        check_shares(model, [Share(0, 1, self.rank)])
        _check_saving(model, self.rank)
        values = block_influence(model, batches)
        order = sorted(range(len(values)), key=values.__getitem__)[: self.num_blocks]
        kept = [layer for layer in range(len(values)) if layer not in order]
        residuals = _residuals(model, order, kept, self.rank, progress=progress)
        donors = [kept[min(range(len(kept)), key=row.__getitem__)] for row in residuals]
        shares = tuple(
            Share(layer, donor, self.rank, self.fit) for layer, donor in sorted(zip(order, donors, strict=True))
        )
        found = {"order": order, "influence": values, "donors": donors, "residuals": residuals}
        plan = make_plan(self, model, structure, batches, found=found)
        return dataclasses.replace(plan, share=shares)


def _check_saving(model: nn.Module, rank: int) -> None:
    shapes = [weight_of(module).shape for module in linear_roles(find_blocks(model)[0]).values()]
    before = sum(rows * columns for rows, columns in shapes)
    after = sum(min(rank, rows, columns) * (rows + columns) for rows, columns in shapes)
    if after >= before:
        raise ValueError(
            f"differences of rank {rank} hold {after} numbers per block, its own matrices {before}; give a smaller rank"
        )


@torch.no_grad()
def _residuals(
    model: nn.Module, layers: Sequence[int], donors: Sequence[int], rank: int, *, progress: bool
) -> list[list[float]]:
    """Return, per block and donor, the sum over linear layers of what the best differences leave."""
    roles = [linear_roles(block) for block in find_blocks(model)]
    is_shown = progress and distributed.is_first_rank()
    pairs = tqdm([(layer, donor) for layer in layers for donor in donors], desc="donors", disable=not is_shown)
    found = [
        sum(
            donor_residual(weight_of(module).detach(), weight_of(roles[donor][name]).detach(), rank)
            for name, module in roles[layer].items()
        )
        for layer, donor in pairs
    ]
    return [found[start : start + len(donors)] for start in range(0, len(found), len(donors))]
