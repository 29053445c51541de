"""Tell which lists of a configuration hold something for each block, and which only happen to be as long.

Nothing goes by names: a list is one per block if the class cannot be built with one block more unless the list grows
with it, or if other blocks come out when its entries change places. Lists of tokens or of rotary factors do neither.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_prune.structured.discovery.blueprint import Blueprint, Path

__all__ = ["lists_per_block"]

_MAX_SETS = 64  # sets of lists that are tried to grow along


def lists_per_block(
    blueprint: Blueprint, field: Path, number: int, containers: Sequence[str], lists: Mapping[Path, list[Any]]
) -> tuple[Path, ...]:
    """Return those lists that hold one entry per block.

    Args:
        blueprint: of the model.
        field: that counts the blocks.
        number: of blocks.
        containers: names of the module lists that hold the blocks.
        lists: the values of all lists of this length.
    """
    if not lists:
        return ()
    chosen = _smallest_set(blueprint, field, number, lists)
    plain = _described(blueprint, {}, containers)
    moved = {
        path
        for path, values in lists.items()
        if any(value != values[0] for value in values)
        and (other := _described(blueprint, {path: values[::-1]}, containers)) is not None
        and other != plain
    }
    return tuple(path for path in lists if path in chosen or path in moved)


def _smallest_set(blueprint: Blueprint, field: Path, number: int, lists: Mapping[Path, list[Any]]) -> tuple[Path, ...]:
    """Return the fewest lists that must grow or fall along with the number of blocks for the class to be built."""
    sets = [chosen for size in range(len(lists) + 1) for chosen in itertools.combinations(lists, size)][:_MAX_SETS]
    longer = (
        ({field: number + 1, **{path: [*lists[path], lists[path][-1]] for path in chosen}}, chosen) for chosen in sets
    )
    shorter = (({field: number - 1, **{path: lists[path][:-1] for path in chosen}}, chosen) for chosen in sets)
    for edits, chosen in itertools.chain(longer, shorter):
        if blueprint.shapes_with(edits) is not None:
            return chosen
    return ()


def _described(blueprint: Blueprint, edits: Mapping[Path, Any], containers: Sequence[str]) -> object:
    """Return what the blocks are: their modules, with the plain values these hold, and their shapes."""
    shapes = blueprint.shapes_with(edits)
    if shapes is None:
        return None
    model = blueprint.skeleton(edits)
    return (
        [(name, shape) for name, shape in shapes.items() if name.startswith(tuple(f"{c}." for c in containers))],
        [
            (name, type(module), _plain(module))
            for container in containers
            for name, module in model.get_submodule(container).named_modules()
        ],
    )


def _plain(module: nn.Module) -> dict[str, object]:
    return {key: value for key, value in vars(module).items() if isinstance(value, str | int | float | None)}
