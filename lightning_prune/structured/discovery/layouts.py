"""Where the units of a group can lie in a fused tensor, likeliest first.

A dimension of size a * n + b holds n units of a entries each, and b entries that belong to something else. Its units
can lie one after another (query, key and value of one head side by side), or part by part (all gates, then all ups).
"""

from collections.abc import Iterator

from lightning_prune.structured.discovery.roles import Dimension

__all__ = ["Runs", "layouts"]

Runs = tuple[tuple[int, int], ...]


def layouts(dimension: Dimension, num_units: int, *, parts_first: bool, query_size: int = 0) -> Iterator[Runs]:
    """Yield (offset, size) runs of the units; see `Member`.

    Args:
        dimension: where they lie.
        num_units: how many there are.
        parts_first: whether [all gates; all ups] is likelier than pairs.
        query_size: of a key/value group's entries, how many belong to its query heads, if that is known.
    """
    size = dimension.per_unit
    if 0 < query_size < size:
        rest = size - query_size
        keys = query_size * num_units
        if rest % 2 == 0:
            yield (0, query_size), (keys, rest // 2), (keys + rest // 2 * num_units, rest // 2)
        yield (0, query_size), (keys, rest)
    divisors = [parts for parts in range(1, size + 1) if size % parts == 0]
    divisors.sort(key=lambda parts: (parts != size if parts_first else parts != 1, parts))
    for parts in divisors:
        run = size // parts
        for start in dict.fromkeys((0, dimension.rest)):
            yield tuple((start + part * run * num_units, run) for part in range(parts))
