"""Make a plan from zeros: units that nothing reads any more go.

A unit whose columns are zero in every output projection adds nothing to the model, so that cutting it changes no
output. Masks of granularity Channel on output projections leave such columns behind when training ends.

Cost: reads the output projections once.
Limits: feed-forward units, heads and key/value groups, and other units whose values meet no norm on their way; a zero
    residual channel or expert still takes part in norms and in routing. The stock class holds one number of units for
    all blocks, so where blocks differ the largest number stays in all of them.

Shapes: U units.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.structure import Structure

__all__ = ["alive_units", "can_fall", "plan_from_zeros"]


def plan_from_zeros(model: nn.Module, structure: Structure) -> Plan:
    """Return the plan that removes the units whose slices are zero in all that reads them.

    Args:
        model: whole tensors; unchanged.
        structure: what `discover` found in a model of the same configuration whose weights are not zero.

    Returns:
        The plan; `method["notes"]` says where zeroed units had to stay.

    Raises:
        ValueError: if nothing is zero, or zeros are so spread that no number of units can fall.
    """
    tensors = model.state_dict(keep_vars=True)
    alive = {group.key: alive_units(group, tensors) for group in structure.groups.values() if can_fall(group)}
    cuts: dict[str, Cut] = {}
    notes: list[str] = []
    for groups in _sharing(model, structure, alive):
        kept = [_without_orphans(group, alive, cuts) for group in groups]
        number = max(_largest_part(group, alive_U) for group, alive_U in zip(groups, kept, strict=True))
        first = groups[0]
        number = first.at_least(number * first.num_parts) // first.num_parts
        padded = 0
        for group, alive_U in zip(groups, kept, strict=True):
            keep = _padded(group, alive_U, number)
            padded += len(keep) - int(alive_U.sum())
            if len(keep) < group.num_units:
                cuts[group.key] = Cut(group.key, keep)
        if padded and number * groups[0].num_parts < groups[0].num_units:
            notes.append(
                f"{groups[0].kind}: {padded} zeroed units stay, so that all {len(groups)} groups keep "
                f"{number * groups[0].num_parts} of {groups[0].num_units}, as the class of the model needs it"
            )
    if not cuts:
        raise ValueError(_why_nothing(alive))
    ordered = tuple(cuts[key] for key in structure.groups if key in cuts)
    return Plan(cuts=ordered, method={"name": "zeros", "notes": notes})


def alive_units(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return alive_U, bool: whether anything that reads a unit has a weight for it that is not zero."""
    alive_U = torch.zeros(group.num_units, dtype=torch.bool)
    for member in group.readers:
        data, dim = tensors[member.name].detach(), member.dim
        if member.expert is not None:
            data, dim = data[member.expert], dim - 1
        used = (data != 0).movedim(dim, 0).flatten(1).any(1).cpu()
        for offset, size in member.runs:
            alive_U |= used[offset : offset + size * group.num_units].reshape(group.num_units, size).any(1)
    return alive_U


def can_fall(group: Group) -> bool:
    """Return whether a unit that is zero in what reads it has no effect left: no norm, no routing."""
    if group.kind in ("hidden", "experts") or not group.readers:
        return False
    return all(member.role != "norm" and not member.power for member in group.members)


def _sharing(model: nn.Module, structure: Structure, alive: Mapping[str, Tensor]) -> list[list[Group]]:
    """Return the groups that must keep equal numbers, key/value groups before the heads in them."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    found: dict[tuple[object, ...], list[Group]] = {}
    for key in alive:
        group = structure.groups[key]
        has_own = any(isinstance(_value(values, name), list) for name in group.fields)
        place = group.layer if has_own else None
        found.setdefault((group.kind, tuple(sorted(group.fields)), group.num_units, place), []).append(group)
    return sorted(found.values(), key=lambda groups: groups[0].kind == "heads")


def _value(values: Mapping[str, Any], name: str) -> Any:
    inner: Any = values
    for key in name.split("."):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return inner


def _without_orphans(group: Group, alive: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> Tensor:
    """Return alive_U, where heads of key/value groups that go do not count."""
    alive_U = alive[group.key].clone()
    parent = cuts.get(f"{group.name}:kv_groups") if group.kind == "heads" else None
    if parent is not None and group.num_parts > 1:
        gone = sorted(set(range(group.num_parts)) - set(parent.keep))
        alive_U.reshape(group.num_parts, -1)[gone] = False
    return alive_U


def _largest_part(group: Group, alive_U: Tensor) -> int:
    return int(alive_U.reshape(group.num_parts, -1).sum(1).max())


def _padded(group: Group, alive_U: Tensor, number: int) -> tuple[int, ...]:
    """Return the living units, and of each part so many of the first zeroed ones that it has the number."""
    keep: list[int] = []
    size = group.num_units // group.num_parts
    for part, alive in enumerate(alive_U.reshape(group.num_parts, size)):
        order = torch.argsort((~alive).long(), stable=True)[:number]
        keep += [part * size + unit for unit in sorted(order.tolist())]
    return tuple(keep)


def _why_nothing(alive: Mapping[str, Tensor]) -> str:
    zeroed = sum(int((~alive_U).sum()) for alive_U in alive.values())
    if zeroed:
        return (
            f"{zeroed} units are zero, but for every kind some block keeps all of its units, and the class of the "
            "model has one number for all blocks; prune with allocation Uniform and a scorer of scope tensor, and "
            "grouped-query heads by whole key/value groups (granularity.width = head size x heads per group)"
        )
    kinds = _names(alive)
    return (
        f"no unit is zero in all output projections that read it ({kinds}); train with granularity Channel on the "
        "output projections, for example recipe structured/train_ffn, with width = head size for heads, up to the "
        "end of its schedule"
    )


def _names(alive: Mapping[str, Tensor]) -> str:
    kinds: Sequence[str] = sorted({key.rpartition(":")[2] for key in alive})
    return ", ".join(kinds) or "the model has none that can be cut"
