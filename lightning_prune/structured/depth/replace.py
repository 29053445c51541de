"""Remove a run of blocks and fold a linear map that stands in for it into the output projection just before it.

The map turns the update of the last feed-forward part before the run into what the run would have added as well. It is
found by least squares, so nothing is trained, and it goes into existing weights, so no parameter is added.

Source: ReplaceMe, arXiv 2505.02819 (mts-ai/ReplaceMe), least-squares form. Differences: padding is left out, the solve
    is float64 with a small ridge, the run is chosen by the mean angular distance over all tokens.
Cost: two passes over the batches; D x D numbers in float64, twice, and one solve.
Limits: the stream after a block must be its feed-forward update plus the rest: a norm or a factor on the output of the
    projection is refused, and so are mixtures of experts. The first block stays.

Shapes: N tokens that are not padding, D width of the residual stream, F feed-forward width.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.calibration.walk import evaluating
from lightning_prune.structured.depth.bypass import first_tensor
from lightning_prune.structured.depth.criteria import model_logits
from lightning_prune.structured.depth.influence import block_streams, run_distance
from lightning_prune.structured.depth.planning import check_no_state_file, check_number, make_plan
from lightning_prune.structured.groups import Group, Plan
from lightning_prune.structured.method import Batch, StateFile, StructuredMethod
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.undo import undone_on_error
from lightning_prune.targets.targets import find_blocks, is_linear

__all__ = ["ReplaceMe", "fit_map", "merge_map", "output_projection"]

MIN_TOKENS_PER_CHANNEL = 2
TOLERANCE = 0.1  # of the update's norm; a norm behind the projection is wrong by 1, bfloat16 by less than 0.05


def fit_map(gram_DD: Tensor, cross_DD: Tensor, *, ridge: float) -> Tensor:
    """Solve for the R that makes M R closest to Y.

    Args:
        gram_DD: M^T M, float64.
        cross_DD: M^T Y, float64.
        ridge: added to the diagonal, relative to its mean.

    Raises:
        ValueError: if the system cannot be solved.
    """
    added = ridge * gram_DD.diagonal().mean()
    solution_DD, failed = torch.linalg.solve_ex(gram_DD + added * torch.eye(len(gram_DD)).to(gram_DD), cross_DD)
    if int(failed) or not solution_DD.isfinite().all():
        raise ValueError(f"the updates do not span all {len(gram_DD)} channels; give more tokens or ridge > {ridge}")
    return solution_DD


@torch.no_grad()
def merge_map(projection: nn.Module, map_DD: Tensor) -> None:
    """Change a linear layer so that its output is multiplied by a map from the right.

    Args:
        projection: nn.Linear, weight (D, F), or a transposed Conv1D, weight (F, D).
        map_DD: the map; the product is taken in float64.

    Raises:
        ValueError: if the module is neither.
    """
    if not is_linear(projection):
        raise ValueError(f"a map can be merged into a linear layer, got {type(projection).__name__}")
    weight, bias = _parameter(projection, "weight"), getattr(projection, "bias", None)
    matrix_DD = map_DD.to(device=weight.device, dtype=torch.float64)
    if isinstance(projection, nn.Linear):
        weight.copy_(matrix_DD.T @ weight.double())
    else:
        weight.copy_(weight.double() @ matrix_DD)
    if bias is not None:
        bias.copy_(bias.double() @ matrix_DD)


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def output_projection(model: nn.Module, groups: Sequence[Group], layer: int) -> nn.Module:
    """Return the one linear layer that writes the feed-forward update of a block.

    Raises:
        ValueError: if there is none, or several, or its weight is shared or sharded.
    """
    names = {m.name for group in groups if group.layer == layer and group.kind == "ffn" for m in group.readers}
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {id(modules[name.rpartition(".")[0]]): modules[name.rpartition(".")[0]] for name in names}
    found = list(owners.values())
    if len(found) != 1 or not is_linear(found[0]):
        raise ValueError(
            f"block {layer} must write its feed-forward update by one linear layer, got {sorted(names) or 'none'}; "
            "choose another run by start, or delete blocks without a map"
        )
    weight = _parameter(found[0], "weight")
    uses = [name for name, value in model.named_parameters(remove_duplicate=False) if value is weight]
    if len(uses) != 1 or distributed.is_sharded(weight):
        raise ValueError(f"the weight of {sorted(names)[0]} is shared or sharded; the map needs a whole one of its own")
    return found[0]


def _check_linear(model: nn.Module, batch: Batch, projection: nn.Module, layer: int) -> None:
    """Check that doubling the projection's output adds just that to the stream after the block.

    Raises:
        ValueError: if something stands between the projection and the stream.
    """
    seen: dict[str, Tensor] = {}

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen["update"] = output.detach()
        return 2 * output

    block = find_blocks(model)[layer]
    with ExitStack() as stack:
        stack.callback(block.register_forward_hook(lambda m, a, o: seen.update(after=first_tensor(o).detach())).remove)
        model_logits(model, batch)
        before = seen["after"]
        stack.callback(projection.register_forward_hook(double).remove)
        model_logits(model, batch)
    update_ND = seen["update"].double().reshape(-1, before.shape[-1])
    change_ND = (seen["after"].double() - before.double()).reshape(update_ND.shape)
    error = ((change_ND - update_ND).norm(dim=-1) / update_ND.norm(dim=-1)).median().item()
    if not error <= TOLERANCE:
        raise ValueError(
            f"the output projection of block {layer} does not write into the residual stream unchanged (its update is "
            f"off by {error:.0%}): a norm or a factor follows it, so that no map can be merged; delete blocks instead"
        )


@dataclass(frozen=True)
class _Moments:
    """Sums over all tokens: of M^T M, of M^T Y, of the squares of Y and of Y - M, and their number."""

    gram_DD: Tensor
    cross_DD: Tensor
    target: Tensor
    change: Tensor
    num_tokens: Tensor

    def unexplained(self, map_DD: Tensor) -> float:
        """Return the squared error with the map, relative to that of deleting the run without one."""
        error = self.target - 2 * (map_DD * self.cross_DD).sum() + (map_DD * (self.gram_DD @ map_DD)).sum()
        return float(error / self.change)


def _moments(
    model: nn.Module, batches: Sequence[Batch], projection: nn.Module, start: int, num_blocks: int
) -> _Moments:
    """Collect M, the update of the block before the run, and Y, the same plus all that the run adds."""
    updates: list[Tensor] = []
    sums: list[list[Tensor]] = []
    handle = projection.register_forward_hook(lambda module, args, output: updates.append(output.detach()))
    try:
        for batch in batches:
            updates.clear()
            _, outputs, mask_BT = block_streams(model, batch)
            update_ND = updates[0].reshape(*mask_BT.shape, -1)[mask_BT].double()
            change_ND = outputs[start + num_blocks - 1][mask_BT].double() - outputs[start - 1][mask_BT].double()
            target_ND = change_ND + update_ND
            new = [update_ND.T @ update_ND, update_ND.T @ target_ND, target_ND.square().sum(), change_ND.square().sum()]
            new.append(mask_BT.sum().double())
            sums = [[old + value for old, value in zip(sums[0], new, strict=True)]] if sums else [new]
    finally:
        handle.remove()
    return _Moments(*(distributed.sum_everywhere(value) for value in sums[0]))


@dataclass(frozen=True, kw_only=True)
class ReplaceMe(StructuredMethod):
    """Remove a run of blocks and merge its least-squares stand-in; see the module text.

    Args:
        num_blocks: length of the run; a quarter of the model in the paper.
        start: first block of the run, at least 1; None takes the run of the smallest angular distance.
        ridge: relative to the mean of the diagonal; 0 in the paper, 1e-3 cost nothing in our measurements.
    """

    num_blocks: int
    start: int | None = None
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        at_least(1, num_blocks=self.num_blocks)
        at_least(0, start=self.start, ridge=self.ridge)

    @property
    def repairs(self) -> bool:
        """Return True: the projection before the run is changed."""
        return True

    def plan(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Batch],
        *,
        state_file: StateFile = None,
        progress: bool = True,
    ) -> Plan:
        """Change the projection before the run in place, and return the plan that removes the run.

        Args:
            model: as it was after an error or an interruption.
            structure: its feed-forward groups name the projections.
            batches: calibration data; `attention_mask` leaves out padding.
            state_file: must be None.
            progress: not used; the passes are few.

        Raises:
            ValueError: if the run does not exist, the tokens are too few, or the map cannot be merged.
        """
        check_no_state_file(self, state_file)
        check_number(model, self.num_blocks)
        total = len(find_blocks(model))
        if self.ridge < 0:
            raise ValueError(f"ridge must be >= 0, got {self.ridge}")
        if self.start is not None and not 1 <= self.start <= total - self.num_blocks:
            raise ValueError(f"start must be between 1 and {total - self.num_blocks}, got {self.start}")
        distances = run_distance(model, batches, self.num_blocks)
        start = self.start or min(range(1, len(distances)), key=distances.__getitem__)
        projection = output_projection(model, list(structure.groups.values()), start - 1)
        with evaluating(model), torch.no_grad():
            _check_linear(model, batches[0], projection, start - 1)
            moments = _moments(model, batches, projection, start, self.num_blocks)
        width = len(moments.gram_DD)
        if moments.num_tokens < MIN_TOKENS_PER_CHANNEL * width:
            raise ValueError(
                f"{int(moments.num_tokens)} tokens are too few to fit a map of {width} channels; "
                f"give at least {MIN_TOKENS_PER_CHANNEL * width}, better {32 * width}"
            )
        map_DD = fit_map(moments.gram_DD, moments.cross_DD, ridge=self.ridge)
        found = {"start": start, "distances": distances, "unexplained": moments.unexplained(map_DD)}
        layers = range(start, start + self.num_blocks)
        with undone_on_error(model) as undo:
            for parameter in projection.parameters(recurse=False):
                undo.keep(parameter)
            merge_map(projection, map_DD)
            return make_plan(self, model, structure, batches, layers=layers, found=found)
