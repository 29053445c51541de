"""Say in a table what can be cut from a model, and in sentences what cannot and why."""

from collections.abc import Iterable

from lightning_prune.structured.groups import Group
from lightning_prune.structured.structure import Structure

__all__ = ["overview", "refusals"]

HEADER = ("kind", "groups", "units", "parts", "fields")


def overview(structure: Structure) -> list[tuple[str, ...]]:
    """Return a table: one row per kind of unit and configuration field, and one for the blocks."""
    rows: dict[tuple[str, str], list[Group]] = {}
    for group in structure.groups.values():
        rows.setdefault((group.kind, ", ".join(group.fields) or "-"), []).append(group)
    table: list[tuple[str, ...]] = [HEADER]
    for (kind, fields), groups in rows.items():
        parts = _numbers(group.num_parts for group in groups)
        table.append((kind, str(len(groups)), _numbers(group.num_units for group in groups), parts, fields))
    stack = structure.stack
    if stack is not None and stack.removable:
        removable = len(stack.removable)
        units = str(stack.num_layers) if removable == stack.num_layers else f"{removable} of {stack.num_layers}"
        table.append(("layers", "1", units, "1", ", ".join((stack.field, *stack.lists))))
    return table


def refusals(structure: Structure) -> list[str]:
    """Return one sentence for each kind of unit, field or block that cannot be cut."""
    stack = structure.stack
    kept = {} if stack is None or not stack.removable else stack.kept_always
    return [f"{name}: {reason}" for name, reason in structure.refused.items()] + [
        f"layer {layer}: {reason}" for layer, reason in kept.items()
    ]


def _numbers(values: Iterable[int]) -> str:
    """Return one number, or the smallest and the largest of several."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
