"""Cut a model to a target shape that is given in the words of its own configuration.

Residual channels, heads and FFN units are selected by how active they are, blocks are taken from the middle. What is
left starts the training of a smaller model of the same family better than random weights do.

Source: Samragh et al., Weight subcloning, arXiv 2312.09299; the least squares step follows published accounts of a
    re-implementation. Differences: residual channels are ranked by the outputs of the norms, one list for the whole
    model; the rescaling is measured, not derived; the repair of readers is `solvers/least_squares.py`.
Cost: one pass over the batches; `rescale` takes two more, `compensate` one and a D x D solve per reader.
Limits: selects whole heads, so the head size stays; units of stacked experts cannot be observed. Residual channels
    are the most harmful cut per parameter: `rotate.rotate_and_slice` keeps more. Without training afterwards `rescale`
    mostly hurt a 3-million-parameter model (168 of 192 channels: perplexity 17.6 without, 19.3 with).

Shapes: T tokens, I input features, U units, D residual channels, O output features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.base.statistic import Statistic
from lightning_prune.calibration.walk import Batch
from lightning_prune.structured.build import build_smaller, check_whole, field_edits
from lightning_prune.structured.cutting import without_orphans
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Cut, Group, Member, Plan
from lightning_prune.structured.shrink import shrink
from lightning_prune.structured.structure import Structure
from lightning_prune.structured.width.budgets import chosen
from lightning_prune.structured.width.options import fingerprint
from lightning_prune.structured.width.reader_repair import bind_weight, feed, match_spread_, refit_readers_
from lightning_prune.structured.width.target_shape import target_counts
from lightning_prune.targets.targets import Binding, is_linear

__all__ = ["Repair", "apply_subclone", "middle_removed", "subclone"]

Repair = Literal["none", "least_squares"]


class _MeanMagnitude(Statistic):
    """Mean |f(x)| of every feature over all tokens."""

    source = "input"
    sum_of_magnitudes: Tensor
    num_tokens: Tensor

    def __init__(self, like: Tensor, num_features: int, view: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.view = view
        self.add_state("sum_of_magnitudes", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.to(like.device)

    def update(self, input_TI: Tensor) -> None:
        """Add the tokens of one forward pass."""
        seen_TI = input_TI if self.view is None else self.view(input_TI)
        self.sum_of_magnitudes += seen_TI.abs().sum(0, dtype=torch.float64)
        self.num_tokens += input_TI.shape[0]

    def compute(self) -> Tensor:
        """Return magnitude_I, float64."""
        return self.sum_of_magnitudes / self.num_tokens


def subclone(
    model: nn.Module,
    shape: Mapping[str, int],
    batches: Sequence[Batch],
    *,
    structure: Structure | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> Plan:
    """Return the plan that cuts a model to a shape.

    Args:
        model: whole tensors on one device, unwrapped; unchanged.
        shape: configuration field -> what it shall be, for example `{"hidden_size": 512, "num_hidden_layers": 8}`;
            the fields that are not named stay, and key/value heads that are removed take their query heads along.
        batches: calibration data; not needed where only blocks are removed.
        structure: what `discover` found in the model; found now if it is not given.
        inputs: a small batch for `discover`; made up for models that read tokens.
        progress: whether to show a bar.

    Raises:
        ValueError: if a field is unknown, or the model cannot be cut to the shape or has it already.
    """
    check_whole(model)
    structure = discover(model, inputs) if structure is None else structure
    counts = target_counts(structure, Blueprint(model), shape)
    keep = None if counts.num_layers is None else middle_removed(structure, counts.num_layers)
    groups = [
        structure.groups[key]
        for key in counts.units
        if keep is None or structure.groups[key].layer is None or structure.groups[key].layer in keep
    ]
    rough = _plan(groups, {}, counts.units, keep)
    structure.check_effect(rough)
    _check_class(model, structure, rough)
    scores = _scores(model, groups, batches, progress=progress) if groups else {}
    method = {
        "name": "subclone",
        "shape": dict(shape),
        "calibration": fingerprint(batches) if groups else None,
    }
    return _plan(groups, scores, counts.units, keep, method)


def apply_subclone(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch] = (),
    *,
    compensate: Repair = "none",
    rescale: bool = False,
    structure: Structure | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Return the smaller model that a plan of `subclone` describes.

    Args:
        model: what the plan was made for; unchanged.
        plan: what stays.
        batches: calibration data for the repair and the rescaling.
        compensate: `least_squares` refits the weights that read residual channels, heads or FFN units, so that they
            give what they gave with all of them.
        rescale: whether to multiply the weights that lost inputs so that their outputs spread as they did before.
        structure: what `discover` found in the model; found now if it is not given.
        inputs: a small batch for the checks; made up for models that read tokens.
        progress: whether to show bars.

    Raises:
        ValueError: if the plan does not fit the model, or batches are missing or too few; nothing was changed.
        RuntimeError: if the smaller model computes something else than the masked one.
    """
    if compensate not in get_args(Repair):
        raise ValueError(f"compensate must be none or least_squares, got {compensate!r}")
    if (rescale or compensate != "none") and not batches:
        raise ValueError("rescaling and least squares need calibration batches, got none; pass tokenised batches")
    structure = discover(model, inputs) if structure is None else structure
    source = model
    if compensate == "least_squares":
        source = build_smaller(model, structure, Plan())
        refit_readers_(source, model, structure, plan, batches, progress=progress)
    small = shrink(source, plan, structure=structure, inputs=inputs)
    if rescale:
        match_spread_(small, model, structure, plan, batches, progress=progress)
    return small


def middle_removed(structure: Structure, num_layers: int) -> tuple[int, ...]:
    """Return the blocks that stay when those nearest to the middle go; of two as near, the earlier goes.

    Raises:
        ValueError: if the model has no blocks to remove, or not so many.
    """
    stack = structure.stack
    if stack is None or not stack.removable:
        raise ValueError(f"layers cannot be removed: {structure.refused.get('layers', 'the model has no blocks')}")
    num_removed = stack.num_layers - num_layers
    if num_removed > len(stack.removable):
        raise ValueError(f"{num_removed} blocks would have to go, but only {list(stack.removable)} can be removed")
    middle = (stack.num_layers - 1) / 2
    nearest = sorted(stack.removable, key=lambda layer: (abs(layer - middle), layer))
    gone = set(nearest[:num_removed])
    return tuple(layer for layer in range(stack.num_layers) if layer not in gone)


def _plan(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    num_keep: Mapping[str, int],
    layers: tuple[int, ...] | None,
    method: Mapping[str, Any] | None = None,
) -> Plan:
    """Return the plan that keeps the best units; the first ones where there are no scores yet."""
    cuts = (
        Cut(group.key, chosen(group, scores.get(group.key, torch.zeros(group.num_units)), num_keep[group.key]))
        for group in groups
    )
    return Plan(cuts=tuple(cuts), layers=layers, method=dict(method or {}))


def _scores(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch], *, progress: bool
) -> dict[str, Tensor]:
    """Return the mean activation of the units of all groups, from one pass."""
    if not batches:
        raise ValueError("units are selected by their activation in calibration batches, got none; pass batches")
    made = [(group, member, _observer(model, group, member)) for group in groups for member in _observed(group)]
    feed(model, [pair for _, _, pair in made], batches, title="ranking units", progress=progress)
    scores: dict[str, Tensor] = {}
    for group, member, (_, statistic) in made:
        per_unit_U = _per_unit(group, member, statistic.compute())
        scores[group.key] = scores.get(group.key, torch.zeros_like(per_unit_U)) + per_unit_U
    return scores


def _observed(group: Group) -> list[Member]:
    """Return the norms over residual channels, or the weights that read the units."""
    wanted = "norm" if group.kind == "hidden" else "in"
    found = [member for member in group.members if member.role == wanted]
    if not found:
        raise ValueError(f"{group.key} has no {'norm' if wanted == 'norm' else 'weight that reads it'} to observe")
    return found


def _observer(model: nn.Module, group: Group, member: Member) -> tuple[Binding, Statistic]:
    binding = bind_weight(model, member.name)
    module = binding.module
    if member.role == "norm":
        # `forward` and not the call: the hook that feeds this must not feed itself.
        return binding, _MeanMagnitude(binding.parameter, group.num_units, view=module.forward)
    if member.expert is not None or not is_linear(module):
        raise ValueError(
            f"{group.key}: the inputs of {member.name} cannot be seen, because it does not belong to a linear layer of "
            f"its own (stacked experts); leave {' and '.join(group.fields)} out of the shape"
        )
    return binding, _MeanMagnitude(binding.parameter, binding.shape_OI[1])


def _per_unit(group: Group, member: Member, value_I: Tensor) -> Tensor:
    """Return the mean over the entries of every unit."""
    parts = [value_I[start : start + group.num_units * size].view(-1, size) for start, size in member.runs]
    return torch.cat(parts, 1).mean(1)


def _check_class(model: nn.Module, structure: Structure, plan: Plan) -> None:
    """Check that the model's class can have the shape."""
    blueprint = Blueprint(model)
    edits = field_edits(structure, without_orphans(structure.groups, plan.cuts), plan.layers, blueprint.values)
    if blueprint.shapes_with(edits) is None:
        shown = ", ".join(f"{'.'.join(path)}={value}" for path, value in edits.items())
        raise ValueError(f"{type(model).__name__} cannot have {shown}: {blueprint.why_not(edits)}")
