"""Groups: dimensions of several tensors that must be cut together, and the plan that says which units stay.

A unit of a group is one FFN unit, one query head, one key/value group, one residual channel or one expert. It covers
slices of several parameters, the members of the group. Removing it means cutting all these slices; setting them to
zero simulates that without changing a shape.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Cut", "Fit", "Group", "Kind", "Member", "Plan", "Role", "Share", "check_seal", "sealed", "zeroed"]

Kind = Literal["ffn", "heads", "kv_groups", "hidden", "experts", "channels"]
Role = Literal["out", "in", "vector", "norm"]
Fit = Literal["moments", "least_squares"]
_FIELD = "checksum"


@dataclass(frozen=True)
class Member:
    """The slices of one parameter that belong to the units of a group.

    Unit j covers, for every (offset, size) in `runs`, the indices offset + j * size to offset + (j + 1) * size along
    dimension `dim`; for example a fused [gate; up] of width f has the runs ((0, 1), (f, 1)).

    `role` says what the dimension is to the parameter: `out` its output features, `in` its input features (the
    parameter reads the units), `vector` one entry per index (bias, scale), `norm` the weight of an RMS norm over
    the units. `expert` names the entry of dimension 0 of a stacked expert tensor that the member is confined to.

    A norm over fewer entries divides by another number. With k of n entries left, what is kept of the tensor is
    multiplied by (k / n) ** (power / 2) to make up for it; `offset` is what the module adds to its weight.
    """

    name: str
    dim: int
    runs: tuple[tuple[int, int], ...]
    role: Role
    expert: int | None = None
    power: int = 0
    offset: float = 0.0

    def positions(self, units: Sequence[int]) -> Tensor:
        """Return the indices along `dim` that the units cover, in ascending order."""
        units_U = torch.as_tensor(sorted(units), dtype=torch.long)
        parts = [(offset + units_U[:, None] * size + torch.arange(size)).flatten() for offset, size in self.runs]
        return torch.cat(parts).sort().values


@dataclass(frozen=True)
class Group:
    """Units that can be removed from a model, each from all members at once.

    Args:
        name: the module that holds the members, for example `model.layers.0.mlp`; `hidden` for the residual stream.
        kind: what a unit is.
        layer: index of the block it lies in, None if it spans the model.
        num_units: how many units there are.
        members: the slices of parameters.
        num_parts: units come in so many equal runs, and equally many must stay in each (query heads of grouped-query
            attention: the key/value groups).
        fields: configuration fields that count the units -> what one unit adds to them.
        pins: configuration fields that follow from others unless they are set, and the values to set when cutting.
        epsilons: configuration fields that norms over the units add to a mean square; they grow by n / k.
        min_units: how many must stay at least; `min_reason` says why.
        multiple_of: unless all stay, their number must be a multiple of it (rows that grouped matrix products run).
    """

    name: str
    kind: Kind
    layer: int | None
    num_units: int
    members: tuple[Member, ...]
    num_parts: int = 1
    fields: Mapping[str, int] = field(default_factory=dict)
    pins: Mapping[str, int] = field(default_factory=dict)
    epsilons: tuple[str, ...] = ()
    min_units: int = 1
    min_reason: str = ""
    multiple_of: int = 1

    @property
    def key(self) -> str:
        """Return a name that is unique in the model: one module can hold heads and key/value groups."""
        return f"{self.name}:{self.kind}"

    @property
    def readers(self) -> tuple[Member, ...]:
        """Return the members that read the units: the output projections of FFN units and heads."""
        return tuple(member for member in self.members if member.role == "in")

    @property
    def step(self) -> int:
        """Return the number of units that can only stay or go together."""
        return math.lcm(self.num_parts, self.multiple_of)

    def at_least(self, number: int) -> int:
        """Return the smallest number of units, not below this one, that may stay."""
        return min(self.num_units, -(-max(number, self.min_units, 1) // self.step) * self.step)

    def check_number(self, number: int) -> None:
        """Check that so many units may stay.

        Raises:
            ValueError: if there are too few for the model to run, or it could not multiply by so narrow rows.
        """
        if number < self.min_units:
            raise ValueError(
                f"{self.key} would keep {number} of {self.num_units} units, but {self.min_reason}; at least "
                f"{self.at_least(0)} must stay, a sparsity of at most {1 - self.at_least(0) / self.num_units:.4g}"
            )
        if number < self.num_units and number % self.multiple_of:
            near = number // self.multiple_of * self.multiple_of
            possible = " or ".join(str(n) for n in (near, near + self.multiple_of) if 0 < n <= self.num_units)
            raise ValueError(
                f"{self.key} would keep {number} of {self.num_units} units; the grouped matrix products of stacked "
                f"experts need rows of whole 16 bytes, also in half precision: keep {possible}, or plan with "
                f"multiple_of={self.multiple_of}"
            )

    def check_keep(self, keep: Sequence[int]) -> None:
        """Check that these units may be what stays.

        Raises:
            ValueError: if units repeat or do not exist, none is left, or the parts keep unequal numbers.
        """
        if len(set(keep)) != len(keep) or any(not 0 <= unit < self.num_units for unit in keep):
            raise ValueError(
                f"{self.key} has the units 0 to {self.num_units - 1}, each at most once; got keep={_shown(keep)}"
            )
        if not keep:
            raise ValueError(f"nothing of {self.key} would be left; keep at least one unit, or remove the sub-block")
        self.check_number(len(keep))
        size = self.num_units // self.num_parts
        counts = torch.bincount(torch.as_tensor(list(keep)) // size, minlength=self.num_parts)
        if counts.unique().numel() > 1:
            raise ValueError(
                f"{self.key} must keep equally many of its {size} units in each of its {self.num_parts} parts, "
                f"got {_shown(counts.tolist())}; cut evenly{', or cut whole key/value groups' * (self.kind == 'heads')}"
            )


def _shown(values: Sequence[object], limit: int = 12) -> str:
    """Return the first values as text."""
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return f"[{', '.join(map(str, values[:limit]))}{more}]"


@dataclass(frozen=True)
class Cut:
    """The units of one group that stay."""

    group: str
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """A block that computes with the matrices of another one, the donor, and differences of a rank.

    `fit` says what the scale and shift of its update restore: `moments` the mean and spread of the original block's,
    `least_squares` its values as nearly as they can.
    """

    layer: int
    donor: int
    rank: int
    fit: Fit = "moments"


@dataclass(frozen=True)
class Plan:
    """What is kept of a model; plain values, so that it can be stored, read and replayed on a fresh parent.

    Args:
        cuts: the units that stay, for every group that is cut, by `Group.key`.
        layers: indices of the blocks that stay, in order; None keeps all.
        skip: (block, "attention" or "mlp") for every sub-block that is removed; block indices are the parent's.
        method: what made the plan, and with which options.
        share: blocks that give up their own matrices.
    """

    cuts: tuple[Cut, ...] = ()
    layers: tuple[int, ...] | None = None
    skip: tuple[tuple[int, str], ...] = ()
    method: Mapping[str, Any] = field(default_factory=dict)
    share: tuple[Share, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, ready for JSON, with a checksum."""
        shares = {"share": [[share.layer, share.donor, share.rank, share.fit] for share in self.share]}
        values = {
            "format": 2 if self.share else 1,  # what reads format 1 alone would keep these blocks as they are
            "method": dict(self.method),
            "cuts": {cut.group: list(cut.keep) for cut in self.cuts},
            "layers": None if self.layers is None else list(self.layers),
            "skip": [list(pair) for pair in self.skip],
            **(shares if self.share else {}),
        }
        return sealed(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Read what `as_dict` wrote, or what was written by hand, without a checksum.

        Raises:
            ValueError: if the format is unknown, or the values are not those that were written.
        """
        if values.get("format") not in (1, 2):
            raise ValueError(f"the plan has format {values.get('format')!r}; this version reads format 1 or 2")
        if "checksum" in values:
            check_seal(values, what="the plan", cure="make it anew, or delete the checksum if it was edited on purpose")
        return cls(
            cuts=tuple(Cut(name, tuple(keep)) for name, keep in values["cuts"].items()),
            layers=None if values["layers"] is None else tuple(values["layers"]),
            skip=tuple((int(layer), str(part)) for layer, part in values["skip"]),
            method=dict(values["method"]),
            share=tuple(Share(*entry) for entry in values.get("share", ())),
        )


@contextmanager
def zeroed(model: nn.Module, groups: Mapping[str, Group], cuts: Sequence[Cut]) -> Iterator[None]:
    """Set the slices of all removed units to zero, and put the very same numbers back afterwards.

    Experts keep their weights: see `expert_mask`.
    """
    tensors = model.state_dict(keep_vars=True)
    backups: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        for cut in cuts:
            group = groups[cut.group]
            removed = sorted(set(range(group.num_units)) - set(cut.keep))
            for member in group.members if removed and group.kind != "experts" else ():
                data, dim = tensors[member.name].data, member.dim
                if member.expert is not None:
                    data, dim = data[member.expert], dim - 1
                positions = member.positions(removed).to(data.device)
                backups.append((data, dim, positions, data.index_select(dim, positions)))
                data.index_fill_(dim, positions, 0)
        yield
    finally:
        for data, dim, positions, values in reversed(backups):
            data.index_copy_(dim, positions, values)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that JSON can hold with their checksum beside them."""
    return {**values, _FIELD: _checksum(values)}


def check_seal(values: Mapping[str, Any], *, what: str, cure: str) -> None:
    """Check that values are those that were sealed.

    Args:
        values: as they were read.
        what: they are, for the message.
        cure: what to do.

    Raises:
        ValueError: if they are others.
    """
    found, due = values.get(_FIELD), _checksum(values)
    if found != due:
        raise ValueError(f"{what} is damaged: its checksum is {found!r}, that of its content {due!r}; {cure}")


def _checksum(values: Mapping[str, Any]) -> str:
    """Return the first 16 digits of the SHA-256 of the values as JSON gives them back."""
    plain = json.loads(json.dumps({key: value for key, value in values.items() if key != _FIELD}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
