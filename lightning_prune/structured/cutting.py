"""Cut tensors: which positions a plan removes from which tensor, and the tensors that are left.

Pure functions of groups, plans and tensors; no model class is known here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.structured.groups import Cut, Group

__all__ = ["Removal", "cut_shape", "cut_tensor", "removal_of", "scale_of", "without_orphans"]

Removal = dict[tuple[str, int], dict[int | None, Tensor]]


def without_orphans(groups: Mapping[str, Group], cuts: Sequence[Cut]) -> dict[str, Cut]:
    """Return the cuts by group, where query heads of removed key/value groups go with them.

    Raises:
        ValueError: if a group is unknown or what it keeps is not allowed.
    """
    result: dict[str, Cut] = {}
    for cut in cuts:
        if cut.group not in groups:
            near = [key for key in groups if key.rpartition(":")[0] == cut.group.rpartition(":")[0]]
            raise ValueError(f"the model has no group {cut.group!r}; it has {', '.join(near or list(groups)[:4])}")
        groups[cut.group].check_keep(cut.keep)
        result[cut.group] = Cut(cut.group, tuple(sorted(cut.keep)))
    for cut in list(result.values()):
        group = groups[cut.group]
        heads = groups.get(f"{group.name}:heads")
        if group.kind == "kv_groups" and heads is not None:
            size = heads.num_units // group.num_units
            kept = result.get(heads.key, Cut(heads.key, tuple(range(heads.num_units)))).keep
            result[heads.key] = Cut(heads.key, tuple(head for head in kept if head // size in set(cut.keep)))
    return result


def removal_of(groups: Mapping[str, Group], cuts: Mapping[str, Cut], shapes: Mapping[str, Sequence[int]]) -> Removal:
    """Return (tensor, dimension) -> expert, or None for all -> which positions go, bool.

    Args:
        groups: by key.
        cuts: by key; a group without one is kept whole.
        shapes: of the tensors, before.
    """
    result: Removal = {}
    for cut in cuts.values():
        group = groups[cut.group]
        removed = sorted(set(range(group.num_units)) - set(cut.keep))
        for member in group.members if removed else ():
            flags = result.setdefault((member.name, member.dim), {})
            size = shapes[member.name][member.dim]
            flags.setdefault(member.expert, torch.zeros(size, dtype=torch.bool))[member.positions(removed)] = True
    return result


def _num_kept(name: str, dim: int, flags: Mapping[int | None, Tensor], num_experts: int) -> int:
    counts = {int((~removed).sum()) for removed in flags.values()}
    if None not in flags and len(flags) < num_experts:
        counts.add(next(iter(flags.values())).numel())
    if len(counts) > 1:
        raise ValueError(
            f"the experts stacked in {name} would keep {sorted(counts)} entries of dimension {dim}; they lie in one "
            "tensor, so all must keep equally many"
        )
    return counts.pop()


def cut_shape(name: str, shape: Sequence[int], removal: Removal) -> tuple[int, ...]:
    """Return the shape a tensor has after the cut.

    Raises:
        ValueError: if stacked experts would become of unequal size.
    """
    return tuple(
        _num_kept(name, dim, removal[name, dim], shape[0]) if (name, dim) in removal else size
        for dim, size in enumerate(shape)
    )


def cut_tensor(name: str, tensor: Tensor, removal: Removal) -> Tensor:
    """Return a tensor without the removed positions; the tensor itself where nothing is removed.

    Dimension 0 is cut last, so that experts are found under their own numbers until then.
    """
    for dim in reversed(range(tensor.ndim)):
        flags = removal.get((name, dim))
        if flags is None:
            continue
        if None in flags:
            tensor = tensor.index_select(dim, (~flags[None]).nonzero().flatten().to(tensor.device))
            continue
        everything = torch.zeros(tensor.shape[dim], dtype=torch.bool)
        kept = [(~flags.get(expert, everything)).nonzero().flatten() for expert in range(tensor.shape[0])]
        rows = [tensor[expert].index_select(dim - 1, keep.to(tensor.device)) for expert, keep in enumerate(kept)]
        tensor = torch.stack(rows)
    return tensor


def scale_of(
    groups: Mapping[str, Group], cuts: Mapping[str, Cut], shapes: Mapping[str, Sequence[int]], removal: Removal
) -> dict[str, tuple[float, float]]:
    """Return tensor -> (factor, offset) for those that make up for norms over fewer entries.

    What is kept of the tensor becomes (kept + offset) * factor - offset.
    """
    powers = {
        (member.name, member.dim): (member.power, member.offset)
        for cut in cuts.values()
        for member in groups[cut.group].members
        if member.power and (member.name, member.dim) in removal
    }
    result: dict[str, tuple[float, float]] = {}
    for (name, dim), (power, offset) in powers.items():
        share = cut_shape(name, shapes[name], removal)[dim] / shapes[name][dim]
        result[name] = (result.get(name, (1.0, 0.0))[0] * share ** (power / 2), offset)
    return result
