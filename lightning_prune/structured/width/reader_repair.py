"""Repair the weights that lost inputs in a width cut: refit them, or restore the spread of their outputs.

Source: least squares as in solvers/least_squares.py, from the inputs of the whole model; the rescaling is that of
    Samragh et al., Weight subcloning, arXiv 2312.09299, with the ratio measured in place of derived.
Cost: refit: one pass, and one I x I matrix in float64 per reader, all at once. Spread: two passes, in which these
    layers are computed twice.
Limits: linear layers of their own; weights that are shared (a tied head) stay as they are.

Shapes: T tokens, I input features, O output features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base.statistic import Statistic
from lightning_prune.calibration import hooks
from lightning_prune.calibration.walk import Batch, evaluating, forward_all
from lightning_prune.solvers.least_squares import default_damping, least_squares
from lightning_prune.statistics.gram import Gram
from lightning_prune.structured.cutting import removal_of, without_orphans
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.undo import undone_on_error
from lightning_prune.targets.layouts import Stored, Transposed
from lightning_prune.targets.targets import Binding, is_linear

__all__ = ["bind_weight", "feed", "lost_columns", "match_spread_", "refit_readers_"]


class _Spread(Statistic):
    """Standard deviation of all entries of a linear layer's output without bias."""

    source = "input"
    total: Tensor
    total_of_squares: Tensor
    num_entries: Tensor

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight_OI = weight_OI
        for name in ("total", "total_of_squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_entries", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.to(weight_OI.device)

    def update(self, input_TI: Tensor) -> None:
        """Add the tokens of one forward pass."""
        output_TO = input_TI @ self.weight_OI.T
        self.total += output_TO.sum(dtype=torch.float64)
        self.total_of_squares += output_TO.double().square().sum()
        self.num_entries += output_TO.numel()

    def compute(self) -> Tensor:
        """Return the standard deviation, float64, of what all ranks have seen."""
        return self.here()

    def here(self) -> Tensor:
        """Return the standard deviation of what this process has seen so far."""
        mean = self.total / self.num_entries
        return (self.total_of_squares / self.num_entries - mean.square()).clamp(min=0).sqrt()


def bind_weight(model: nn.Module, name: str) -> Binding:
    """Return how a weight of any number of dimensions is found in its model and read as a matrix."""
    module = model.get_submodule(name.rpartition(".")[0])
    is_transposed = is_linear(module) and not isinstance(module, nn.Linear)
    return Binding(name, model.get_parameter(name), (module,), Transposed() if is_transposed else Stored())


def feed(
    model: nn.Module,
    feeds: Sequence[tuple[Binding, Statistic]],
    batches: Sequence[Batch],
    *,
    title: str,
    progress: bool,
) -> None:
    """Run all batches through a model and feed the inputs of layers to statistics; padding is left out."""
    handles = hooks.observe_inputs(model, feeds, only_training=False)
    try:
        with evaluating(model):
            forward_all(model, batches, feeds[0][0].parameter.device, progress=progress, title=title)
    finally:
        for handle in handles:
            handle.remove()
    for binding, statistic in feeds:
        if not statistic.update_called:
            raise ValueError(f"no calibration token reached {binding.name}; give batches that do, or more of them")


def lost_columns(model: nn.Module, structure: Structure, plan: Plan) -> dict[str, set[int]]:
    """Return weight -> the input features that a plan takes from it, for linear layers of their own that stay."""
    stack, shared = structure.stack, _shared_tensors(model)
    result: dict[str, set[int]] = {}
    for cut in without_orphans(structure.groups, plan.cuts).values():
        group = structure.groups[cut.group]
        removed = sorted(set(range(group.num_units)) - set(cut.keep))
        for member in group.readers if removed else ():
            layer = None if stack is None else stack.layer_of(member.name)
            stays = plan.layers is None or layer is None or layer in plan.layers
            is_own = member.expert is None and is_linear(model.get_submodule(member.name.rpartition(".")[0]))
            if stays and is_own and member.name not in shared:
                result.setdefault(member.name, set()).update(member.positions(removed).tolist())
    return result


@torch.no_grad()
def refit_readers_(
    copy: nn.Module,
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    progress: bool,
) -> None:
    """Write into a copy of a model the columns that make up for those a plan removes; these are cut later.

    Args:
        copy: changed in place.
        model: whose inputs are observed.
        structure: of both.
        plan: what stays.
        batches: calibration data.
        progress: whether to show a bar.

    Raises:
        ValueError: if there are too few calibration tokens.
    """
    gone = lost_columns(model, structure, plan)
    feeds = []
    for name in gone:
        binding = bind_weight(model, name)
        feeds.append((binding, Gram(binding.parameter.detach(), binding.shape_OI[1])))
    if not feeds:
        return
    feed(model, feeds, batches, title="observing readers", progress=progress)
    for binding, gram in feeds:
        gram_JJ = gram.compute()
        keep = [column for column in range(binding.shape_OI[1]) if column not in gone[binding.name]]
        damping = default_damping(int(gram_JJ[-1, -1]), len(keep), binding.name)
        weight_OI = binding.to_matrix(binding.parameter.detach()).double().clone()
        weight_OI[:, keep] = least_squares(weight_OI, gram_JJ[:-1, :-1], keep, damping)
        copy.get_parameter(binding.name).data.copy_(binding.from_matrix(weight_OI))


@torch.no_grad()
def match_spread_(
    small: nn.Module,
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    progress: bool,
) -> dict[str, float]:
    """Multiply weights that lost inputs so that their outputs spread as in the whole model.

    The factors act while they are measured, so that a layer sees inputs that are rescaled already.

    Args:
        small: what a plan left; changed in place.
        model: what it was cut from; unchanged.
        structure: of the model.
        plan: what stays.
        batches: calibration data.
        progress: whether to show bars.

    Returns:
        weight of the small model -> its factor.

    Raises:
        ValueError: if the outputs of a layer do not vary.
    """
    own = _own_weights(small, model, structure, plan)
    if not own:
        return {}
    spread_of = _whole_spreads(model, structure, plan, list(own.values()), batches, progress=progress)
    wanted = {name: spread_of[origin] for name, origin in own.items()}
    narrow = [bind_weight(small, name) for name in own]
    spreads = [(binding, _Spread(binding.to_matrix(binding.parameter.detach()))) for binding in narrow]
    handles = [binding.module.register_forward_hook(_rescaler(wanted[binding.name], s)) for binding, s in spreads]
    try:
        feed(small, spreads, batches, title="spread of the cut model", progress=progress)
    finally:
        for handle in handles:
            handle.remove()
    factors = {binding.name: _ratio(wanted[binding.name], spread.compute()) for binding, spread in spreads}
    for binding, _ in spreads:
        if not 0 < factors[binding.name] < float("inf"):
            raise ValueError(f"the outputs of {binding.name} do not vary over the batches; leave out the rescaling")
    with undone_on_error(small) as undo:
        for binding, _ in spreads:
            undo.keep(binding.parameter)
            binding.parameter.data.mul_(factors[binding.name])
    return factors


def _whole_spreads(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    progress: bool,
) -> dict[str, float]:
    """Return weight -> the spread of those of its outputs that stay, in the whole model."""
    rows = _kept_rows(model, structure, plan)
    feeds = []
    for name in names:
        binding = bind_weight(model, name)
        weight_OI = binding.to_matrix(binding.parameter.detach())
        feeds.append((binding, _Spread(weight_OI[rows[name]] if name in rows else weight_OI)))
    feed(model, feeds, batches, title="spread of the whole model", progress=progress)
    return {binding.name: float(spread.compute()) for binding, spread in feeds}


def _ratio(wanted: float, spread: Tensor) -> float:
    return wanted / float(spread) if float(spread) > 0 else float("inf")


def _rescaler(wanted: float, spread: _Spread) -> Any:
    """Return a hook that multiplies the output without bias by the factor known so far."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        factor = _ratio(wanted, spread.here())
        bias = getattr(module, "bias", None)
        return output * factor if bias is None else (output - bias) * factor + bias

    return hook


def _own_weights(small: nn.Module, model: nn.Module, structure: Structure, plan: Plan) -> dict[str, str]:
    """Return weight of the small model that lost inputs -> its name in the whole one."""
    lost, stack = lost_columns(model, structure, plan), structure.stack
    result = {}
    for name, _ in small.named_parameters(remove_duplicate=False):
        origin = name if stack is None or plan.layers is None else stack.parent_name(name, plan.layers)
        if origin in lost:
            result[name] = origin
    return result


def _kept_rows(model: nn.Module, structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """Return weight of the whole model -> which of its output features stay, bool."""
    tensors: Mapping[str, Tensor] = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    result: dict[str, Tensor] = {}
    cuts = without_orphans(structure.groups, plan.cuts)
    for (name, dim), flags in removal_of(structure.groups, cuts, shapes).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if is_linear(module) and None in flags and len(shapes[name]) == 2:
            is_output = dim == (0 if isinstance(module, nn.Linear) else 1)
            if is_output:
                result[name] = ~flags[None].to(tensors[name].device)
    return result


def _shared_tensors(model: nn.Module) -> set[str]:
    """Return the names of parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}
