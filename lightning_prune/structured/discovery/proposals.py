"""Make groups of the dimensions that grow with a field, under every order of units that is possible."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch.nn.modules.conv import _ConvNd

from lightning_prune.structured.discovery.blueprint import Change, Path
from lightning_prune.structured.discovery.compensation import compensations
from lightning_prune.structured.discovery.fields import Count
from lightning_prune.structured.discovery.layouts import Runs, layouts
from lightning_prune.structured.discovery.roles import Dimension, Roles, partition
from lightning_prune.structured.groups import Group, Kind, Member
from lightning_prune.structured.structure import Stack

__all__ = ["Proposal", "Proposer"]

_ROW = 8  # entries of 2 bytes in the 16 bytes that rows of grouped matrix products are made of
_MAX_FUSED = 4  # entries of one FFN unit in one tensor; more of them belong to something repeated inside the module


@dataclass(frozen=True)
class Proposal:
    """What is to be proposed: units of a kind, counted by fields.

    Args:
        kind: what a unit is.
        counts: the field that counts the units, and those that follow it.
        pins: fields to set along with them.
        num_parts: equal runs of units that must keep equally many.
        query_sizes: (tensor, dimension) -> how many entries of a key/value group belong to its query heads.
    """

    kind: Kind
    counts: tuple[Count, ...]
    pins: Mapping[Path, int] = field(default_factory=dict)
    num_parts: int = 1
    query_sizes: Mapping[tuple[str, int], int] = field(default_factory=dict)

    @property
    def names(self) -> str:
        """Return the fields in words."""
        return " and ".join(count.name for count in self.counts)


class Proposer:
    """Proposes groups for one model."""

    def __init__(self, roles: Roles, stack: Stack | None) -> None:
        self.roles, self.stack = roles, stack

    def layer(self, name: str) -> int | None:
        """Return the block a tensor or module lies in."""
        return None if self.stack is None else self.stack.layer_of(name)

    def dimensions(self, count: Count, change: Change, factor: float) -> list[Dimension]:
        """Return the changed dimensions as sizes per unit.

        Raises:
            ValueError: naming one that does not grow evenly.
        """
        result = []
        for (name, dim), (before, after) in change.items():
            number = count.at(self.layer(name))
            per_unit, odd = divmod(after - before, round(number * (factor - 1)))
            rest = before - per_unit * number
            if odd or per_unit < 1 or rest < 0:
                raise ValueError(f"{name} goes from {before} to {after} where {count.name} is multiplied by {factor}")
            result.append(Dimension(name, dim, per_unit, rest, self.roles.role(name, dim)))
        return result

    def groups(self, proposal: Proposal, change: Change, factor: float) -> Iterator[list[Group]]:
        """Yield the groups under every order of units and every way to make up for norms, likeliest first.

        Raises:
            ValueError: if the changed dimensions cannot be units of such groups.
        """
        count = proposal.counts[0]
        dimensions = self.dimensions(count, change, factor)
        is_inner = proposal.kind in ("ffn", "channels")
        if is_inner and any(dimension.per_unit > _MAX_FUSED for dimension in dimensions):
            raise ValueError(f"{count.name} is a size inside of heads or groups and counts no units")
        modules = list(partition(dimensions))
        if not modules:
            raise ValueError(f"no module both writes and reads what {count.name} counts")
        places = {dimension.pattern: dimension for _, below in modules for dimension in below}
        orders = [
            dict.fromkeys(
                layouts(
                    dimension,
                    count.at(self.layer(dimension.name)),
                    parts_first=is_inner,
                    query_size=proposal.query_sizes.get((dimension.name, dimension.dim), 0),
                )
            )
            for dimension in places.values()
        ]
        for order in itertools.product(*orders):
            runs = dict(zip(places, order, strict=True))
            groups = [
                self._group(proposal, name, expert, below, runs)
                for module, below in modules
                for name, expert in self._experts(module, below)
            ]
            yield from compensations(_in_rows(self._shared_once(groups)), self.roles)

    def _group(
        self,
        proposal: Proposal,
        name: str,
        expert: int | None,
        dimensions: Sequence[Dimension],
        runs: Mapping[tuple[str, int, int, int], Runs],
    ) -> Group:
        unit = proposal.counts[0].at(None)
        is_convolved = any(isinstance(self.roles.owner(dimension.name), _ConvNd) for dimension in dimensions)
        return Group(
            name=name,
            kind="channels" if proposal.kind == "ffn" and is_convolved else proposal.kind,
            layer=self.layer(name),
            num_units=proposal.counts[0].at(self.layer(name)),
            members=tuple(Member(d.name, d.dim, runs[d.pattern], d.role, expert) for d in dimensions),
            num_parts=proposal.num_parts,
            fields={count.name: max(1, count.at(None) // unit) for count in proposal.counts},
            pins={".".join(path): value for path, value in proposal.pins.items()},
        )

    def _shared_once(self, groups: Sequence[Group]) -> list[Group]:
        """Return groups with those that hold the very same tensors, of a block used in several places, as one."""
        places: dict[object, list[Group]] = {}
        for group in groups:
            held = tuple((id(self.roles.tensors[m.name]), m.dim, m.expert) for m in group.members)
            places.setdefault(held, []).append(group)
        return [
            same[0]
            if len(same) == 1
            else dataclasses.replace(
                same[0],
                layer=same[0].layer if len({group.layer for group in same}) == 1 else None,
                members=tuple(member for group in same for member in group.members),
            )
            for same in places.values()
        ]

    def _experts(self, module: str, dimensions: Sequence[Dimension]) -> list[tuple[str, int | None]]:
        """Return the groups of one module: one, or one for each expert of stacked tensors."""
        stacked = [d for d in dimensions if self.roles.is_stacked(d.name) and d.dim > 0]
        if not stacked:
            return [(module, None)]
        if any(self.roles.tensors[d.name].shape[0] != self.roles.tensors[stacked[0].name].shape[0] for d in dimensions):
            raise ValueError(f"{module} mixes the tensors of stacked experts with others over the same units")
        return [(f"{module}.{expert}", expert) for expert in range(self.roles.tensors[stacked[0].name].shape[0])]

    def expert_groups(self, count: Count, change: Change, factor: float) -> list[Group]:
        """Return the groups of whole experts, stacked in tensors, with their routers.

        Raises:
            ValueError: if the field does not count experts alone.
        """
        dimensions = self.dimensions(count, change, factor)
        if any(not self._is_per_expert(d) or d.per_unit != 1 or d.rest for d in dimensions):
            raise ValueError(f"{count.name} counts more than stacked experts")
        by_layer: dict[int | None, list[Dimension]] = {}
        for dimension in dimensions:
            by_layer.setdefault(self.layer(dimension.name), []).append(dimension)
        return [
            Group(
                name=_common_module([d.name for d in below]),
                kind="experts",
                layer=layer,
                num_units=count.at(layer),
                members=tuple(
                    Member(d.name, d.dim, ((0, 1),), "out" if self.roles.is_stacked(d.name) else "vector")
                    for d in below
                ),
                fields={count.name: 1},
            )
            for layer, below in by_layer.items()
        ]

    def _is_per_expert(self, dimension: Dimension) -> bool:
        """Return whether a dimension is the first, or the only one of a row of numbers, such as correction biases."""
        shape = self.roles.tensors[dimension.name].shape
        return dimension.dim == 0 or shape.numel() == shape[dimension.dim]

    def counts_experts(self, change: Change) -> bool:
        """Return whether what changes is the number of stacked matrices and the rows of a router."""
        ranks = {self.roles.tensors[name].ndim for name, dim in change if dim == 0}
        stacked = any(self.roles.is_stacked(name) and dim == 0 for name, dim in change)
        return stacked and 2 in ranks

    def residual(self, count: Count, change: Change, factor: float, pins: Mapping[Path, int]) -> Group:
        """Return the group of residual channels.

        Raises:
            ValueError: if other widths follow the hidden size, or a norm subtracts the mean over channels.
        """
        dimensions = self.dimensions(count, change, factor)
        for dimension in dimensions:
            if dimension.per_unit != 1 or dimension.rest:
                raise ValueError(f"{dimension.name} follows {count.name} too, and is not the residual stream alone")
            if dimension.role == "norm" and self.roles.norm(dimension.name)[0] == "mean":
                raise ValueError(
                    f"{dimension.name} belongs to a norm that subtracts the mean over all channels, removed ones too"
                )
        return Group(
            name="residual",
            kind="hidden",
            layer=None,
            num_units=count.at(None),
            members=tuple(Member(d.name, d.dim, ((0, 1),), d.role) for d in dimensions),
            fields={count.name: 1},
            pins={".".join(path): value for path, value in pins.items()},
            multiple_of=_row(count.at(None)) if any(self.roles.is_stacked(d.name) for d in dimensions) else 1,
        )


def _row(num_units: int) -> int:
    """Return the multiple in which units of grouped matrix products come: rows of 16 bytes of half precision."""
    return math.gcd(num_units, _ROW)


def _in_rows(groups: Sequence[Group]) -> list[Group]:
    """Return groups that one field counts; where some are units of stacked experts, all come in whole rows."""
    stacked = [g for g in groups if g.kind == "ffn" and any(member.expert is not None for member in g.members)]
    row = math.lcm(*(_row(group.num_units) for group in stacked)) if stacked else 1
    return [dataclasses.replace(group, multiple_of=math.gcd(row, group.num_units)) for group in groups]


def _common_module(names: Sequence[str]) -> str:
    """Return the module that holds all tensors of these names."""
    parts = [name.split(".")[:-1] for name in names]
    return ".".join(
        same[0] for same in itertools.takewhile(lambda part: len(set(part)) == 1, zip(*parts, strict=False))
    )
