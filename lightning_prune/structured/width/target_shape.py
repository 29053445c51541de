"""Read a target shape, given in the words of a model's configuration, as units and blocks to keep."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.base.registry import unknown
from lightning_prune.structured.discovery.blueprint import Blueprint, leaves
from lightning_prune.structured.groups import Group
from lightning_prune.structured.structure import Structure

__all__ = ["Counts", "target_counts"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What is to be left.

    Args:
        units: group -> how many of its units stay, for the groups that lose some. Query heads are counted before
            those of removed key/value groups go.
        num_layers: how many blocks stay; None for all.
    """

    units: Mapping[str, int]
    num_layers: int | None


def target_counts(structure: Structure, blueprint: Blueprint, shape: Mapping[str, int]) -> Counts:
    """Return how many units and blocks stay.

    Args:
        structure: what can be cut.
        blueprint: of the model, for its configuration.
        shape: field -> value; fields that already have their value are allowed.

    Raises:
        ValueError: if a field is unknown or counts nothing that can be cut, a value is not below the model's, or
            units cannot be shared equally.
    """
    flat = {".".join(path): value for path, value in leaves(blueprint.values)}
    wanted = {_field(name, structure, blueprint, flat): value for name, value in shape.items()}
    stack = structure.stack
    num_layers = wanted.pop(stack.field, None) if stack is not None else None
    if stack is not None and num_layers == stack.num_layers:
        num_layers = None
    if stack is not None and num_layers is not None:
        _check_value(stack.field, num_layers, stack.num_layers)
    counted = {field for group in structure.groups.values() for field in group.fields}
    for field, value in wanted.items():
        if field not in counted and value != flat[field]:
            raise ValueError(f"{field} is {flat[field]!r} and cannot be cut; {_possible(structure, flat)}")
    units: dict[str, int] = {}
    for group in sorted(structure.groups.values(), key=lambda group: group.kind == "heads"):  # after their kv groups
        left = _units_left(group, structure, wanted, flat, units)
        if left != group.num_units:
            units[group.key] = left
    return Counts(units=units, num_layers=num_layers)


def _units_left(
    group: Group, structure: Structure, wanted: Mapping[str, int], flat: Mapping[str, object], units: Mapping[str, int]
) -> int:
    """Return how many units of a group stay."""
    heads = structure.groups.get(f"{group.name}:heads")
    kv_groups = structure.groups.get(f"{group.name}:kv_groups") if group.kind == "heads" else None
    left: dict[str, int] = {}
    for field, step in group.fields.items():
        if field not in wanted or (group.kind == "kv_groups" and heads is not None and field in heads.fields):
            continue  # fewer query heads can also come from fewer in every group
        own = _own_value(field, flat[field], group)
        _check_value(field, wanted[field], own)
        removed, odd = divmod(own - wanted[field], step)
        if odd:
            raise ValueError(f"{field} falls from {own} in steps of {step}, so it cannot become {wanted[field]}")
        left[field] = group.num_units - removed
    if not left:
        return group.num_units
    if len(set(left.values())) > 1:
        shown = ", ".join(f"{field}={wanted[field]}" for field in left)
        raise ValueError(f"{group.key} is counted by several fields, which do not agree: {shown}")
    field, num_units = next(iter(left.items()))
    parts_left = units.get(kv_groups.key, kv_groups.num_units) if kv_groups is not None else group.num_parts
    if num_units % parts_left:
        raise ValueError(
            f"{field}={wanted[field]} cannot be shared by {parts_left} key/value heads; possible are "
            f"{_multiples(parts_left, group.num_units // group.num_parts)}"
        )
    per_part = num_units // parts_left
    if per_part > group.num_units // group.num_parts:
        raise ValueError(
            f"{field}={wanted[field]} needs {per_part} query heads for each of {parts_left} key/value heads, the model "
            f"has {group.num_units // group.num_parts}; possible are "
            f"{_multiples(parts_left, group.num_units // group.num_parts)}"
        )
    try:
        group.check_number(per_part * group.num_parts)
    except ValueError as error:
        raise ValueError(f"{field}={wanted[field]}: {error}") from error
    return per_part * group.num_parts


def _multiples(step: int, number: int) -> str:
    return ", ".join(str(step * count) for count in range(1, number + 1))


def _own_value(field: str, value: object, group: Group) -> int:
    if isinstance(value, list):
        value = value[group.layer or 0]
    if not isinstance(value, int):
        raise ValueError(f"{field} is {value!r}, which is no number of units")
    return value


def _check_value(field: str, value: object, own: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= own:
        raise ValueError(f"{field} can become a whole number from 1 to the model's own {own}, got {value!r}")


def _field(name: str, structure: Structure, blueprint: Blueprint, flat: Mapping[str, object]) -> str:
    """Return the dotted name of a field that may be called by its last part, or by its standard name."""
    aliases: Mapping[str, str] = getattr(blueprint.config, "attribute_map", None) or {}
    name = aliases.get(name, name)
    if name in flat:
        return name
    inner = [field for field in flat if field.rpartition(".")[2] == name]
    if len(inner) == 1:
        return inner[0]
    if inner:
        raise ValueError(f"{name!r} is ambiguous in the configuration: {', '.join(inner)}; give the dotted name")
    raise ValueError(f"{unknown('configuration field', name, list(flat))}; {_possible(structure, flat)}")


def _possible(structure: Structure, flat: Mapping[str, object]) -> str:
    """Return what can be cut, with the model's own values."""
    fields = dict.fromkeys(field for group in structure.groups.values() for field in group.fields)
    if structure.stack is not None and structure.stack.removable:
        fields[structure.stack.field] = None
    shown = ", ".join(f"{field} (now {flat[field]})" for field in fields) or "nothing"
    refused = "; ".join(f"{what} cannot: {reason}" for what, reason in structure.refused.items())
    return f"what can be cut: {shown}" + (f"; {refused}" if refused else "")
