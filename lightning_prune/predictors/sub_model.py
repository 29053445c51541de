"""From the masks of one instruction to a physically small model that computes the same without them.

The small model is a stock one of the parent's class. Every tensor that is not cut is the parent's, in the same memory;
of the others the kept rows and columns are gathered, and what a mask multiplies is folded into the columns of the
layers that read the units. That is exact for gated, plain and fused FFNs alike; a fold into the rows of an up
projection would be exact for gated ones only.

The class is built once for each set of sizes. Every further selection copies the tree of modules, which holds no
weights, and gathers.

Source: Hou et al., Instruction-Following Pruning, arXiv 2501.02086, section 3.4, which gathers rows and does not say
    where the mask's numbers go.
Cost: one pass over the kept bytes, where the parent's tensors lie so that units are rows, see `SubModels.lay_out`.
Limits: no units of experts, no norms over the units.

Shapes: U units of a group, K kept ones, P positions of a dimension that they cover.
"""

import copy
import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.structured.build import build_smaller
from lightning_prune.structured.groups import Cut, Group, Member, Plan
from lightning_prune.structured.structure import Structure

__all__ = ["Selection", "SubModels"]


@dataclass(frozen=True)
class Selection:
    """The units of each group that an instruction keeps, ascending, (K,), and what each is multiplied by, (K,)."""

    units: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @classmethod
    def of(cls, masks: Sequence[Tensor], keep: Sequence[int], row: int = 0) -> "Selection":
        """Return the selection of one instruction.

        Args:
            masks: of each group, (B, U), at most `keep` entries of a row not 0.
            keep: how many units of each group stay.
            row: of the instruction.
        """
        units = [mask[row].topk(k).indices.sort().values for mask, k in zip(masks, keep, strict=True)]
        scales = [mask[row].detach().float()[kept_K] for mask, kept_K in zip(masks, units, strict=True)]
        return cls(tuple(units), tuple(scales))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return how many units of each group stay."""
        return tuple(len(kept_K) for kept_K in self.units)

    @functools.cached_property
    def digest(self) -> str:
        """Return what tells this selection from others, as text; two masks that are equal have one."""
        sha = hashlib.sha256(repr(self.sizes).encode())
        for parts in (self.units, self.scales):
            sha.update(torch.cat(parts).cpu().numpy().tobytes())
        return sha.hexdigest()

    def plan(self, groups: Sequence[Group], **method: object) -> Plan:
        """Return the cuts as a plan; the scales are not in it."""
        cuts = (Cut(group.key, tuple(kept_K.tolist())) for group, kept_K in zip(groups, self.units, strict=True))
        return Plan(cuts=tuple(cuts), method=method)


@dataclass(frozen=True)
class _Place:
    """A dimension of a tensor that the units of a group cover, and the positions of it that no unit covers."""

    number: int
    member: Member
    others: Tensor
    is_reader: bool

    def positions(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return the positions that stay, ascending, (P,), and the scale of each, (P,)."""
        kept_K, scale_K = selection.units[self.number], selection.scales[self.number]
        if not len(self.others) and self.member.runs == ((0, 1),):
            return kept_K, scale_K
        runs = sorted(self.member.runs)
        parts = [(offset + kept_K[:, None] * size + torch.arange(size, device=kept_K.device)) for offset, size in runs]
        stays_P = torch.cat([part.flatten() for part in parts])
        scale_P = torch.cat([scale_K[:, None].expand_as(part).flatten() for part in parts])
        if len(self.others):
            others = self.others.to(stays_P.device)
            stays_P, order_P = torch.cat((stays_P, others)).sort()
            scale_P = torch.cat((scale_P, scale_P.new_ones(len(others))))[order_P]
        return stays_P, scale_P


class SubModels:
    """Makes small models of one parent, one for each selection of its units.

    Args:
        model: the parent; whole tensors on one device.
        groups: of units, in the order of a selection's.
        without: name of a module of the parent that is none of its own, as a mask predictor.

    Raises:
        ValueError: if the units cannot be gathered: experts, or norms over the units.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], *, without: str | None = None) -> None:
        self.model, self.groups, self._without = model, tuple(groups), without
        tensors = model.state_dict(keep_vars=True)
        self._places: dict[str, list[_Place]] = {}
        for number, group in enumerate(self.groups):
            for member in group.members:
                if member.expert is not None or member.power:
                    what = "experts" if member.expert is not None else "a norm over its units"
                    raise ValueError(f"{group.key} has {what} in {member.name}; no sub-model can be gathered from it")
                others = torch.ones(tensors[member.name].shape[member.dim], dtype=torch.bool)
                others[member.positions(range(group.num_units))] = False
                place = _Place(number, member, others.nonzero().flatten(), member.role == "in")
                self._places.setdefault(member.name, []).append(place)
        self._skeletons: dict[tuple[object, ...], nn.Module] = {}

    def lay_out(self) -> None:
        """Let matrices whose columns are gathered lie transposed in memory, so that a unit is one run of it.

        No value and no shape of the parent changes, and no memory is added; gathering then reads kept bytes alone.
        """
        tensors = self.model.state_dict(keep_vars=True)
        for name, places in self._places.items():
            tensor = tensors[name]
            if tensor.ndim == 2 and {place.member.dim for place in places} == {1} and tensor.is_contiguous():
                tensor.data = tensor.data.t().contiguous().t()

    @property
    def version(self) -> tuple[int, ...]:
        """Return numbers that change when a tensor that is gathered was written to in place, or replaced."""
        tensors = self.model.state_dict(keep_vars=True)
        cut = [tensors[name] for name in self._places]
        written = sum(0 if tensor.is_inference() else tensor._version for tensor in cut)
        return (written, *(tensor.data_ptr() for tensor in cut))

    @torch.no_grad()
    def gather(self, selection: Selection) -> nn.Module:
        """Return the small model of a selection.

        Raises:
            ValueError: if the stock class cannot have these sizes.
        """
        is_scaled = bool((torch.cat(selection.scales) != 1).any())
        tensors = self.model.state_dict(keep_vars=True)
        gathered = {
            name: self._gathered(tensors[name].detach(), places, selection, is_scaled)
            for name, places in self._places.items()
            if self._is_cut(name, selection)
        }
        small = _twin(self._skeleton(selection, tensors), gathered, tensors)
        setattr(small, _SELECTED, selection.digest)
        return small

    def num_bytes(self, selection: Selection) -> int:
        """Return how many bytes the gathered tensors of a selection have; the shared ones do not count."""
        tensors = self.model.state_dict(keep_vars=True)
        total = 0
        for name in self._places:
            if self._is_cut(name, selection):
                shape = list(tensors[name].shape)
                for place in self._places[name]:
                    num_kept = len(selection.units[place.number]) * sum(size for _, size in place.member.runs)
                    shape[place.member.dim] = num_kept + len(place.others)
                total += tensors[name].element_size() * torch.Size(shape).numel()
        return total

    def _is_cut(self, name: str, selection: Selection) -> bool:
        places = self._places[name]
        return any(len(selection.units[place.number]) < self.groups[place.number].num_units for place in places)

    @staticmethod
    def _gathered(tensor: Tensor, places: Sequence[_Place], selection: Selection, is_scaled: bool) -> Tensor:
        """Return the kept part of one tensor, laid out in memory as the whole."""
        for place in places:
            stays_P, scale_P = place.positions(selection)
            scale = scale_P if is_scaled and place.is_reader else None
            dim = place.member.dim
            if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous():
                tensor = _kept(tensor.t(), 1 - dim, stays_P, scale).t()
            else:
                tensor = _kept(tensor, dim, stays_P, scale)
        return tensor

    def _skeleton(self, selection: Selection, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the class at these sizes; the tensors that are cut have no values."""
        key = (*selection.sizes, next(iter(tensors.values())).device)
        if key not in self._skeletons:
            first = Selection(tuple(torch.arange(size) for size in selection.sizes), selection.scales)
            structure = Structure({group.key: group for group in self.groups})
            added = self.model._modules.pop(self._without, None) if self._without is not None else None
            try:
                small = build_smaller(self.model, structure, first.plan(self.groups), share=True).eval()
            finally:
                if added is not None and self._without is not None:
                    self.model._modules[self._without] = added
            _empty(small, {name for name in self._places if self._is_cut(name, selection)})
            self._skeletons[key] = small.requires_grad_(False)
        return self._skeletons[key]


def _empty(model: nn.Module, names: Collection[str]) -> None:
    """Leave parameters without values, tied ones tied."""
    empty = {id(parameter): nn.Parameter(parameter.to("meta")) for parameter in map(model.get_parameter, names)}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            module._parameters[leaf] = empty.get(id(parameter), parameter)


def _kept(tensor: Tensor, dim: int, stays_P: Tensor, scale_P: Tensor | None) -> Tensor:
    """Return the positions that stay, multiplied by their scale."""
    if scale_P is None:
        return tensor.index_select(dim, stays_P)
    if tensor.dtype == torch.float32 and tensor.ndim == 2 and dim == 0:  # a bag of one row each: read and written once
        bags_P = torch.arange(len(stays_P), device=stays_P.device)
        return functional.embedding_bag(stays_P, tensor, bags_P, mode="sum", per_sample_weights=scale_P)
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return tensor.index_select(dim, stays_P).mul_(scale_P.view(shape))


def _twin(skeleton: nn.Module, gathered: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model's modules around other tensors: the gathered ones, and of the rest the parent's."""
    memo: dict[int, object] = {}
    for name, parameter in skeleton.named_parameters():
        tensor = gathered[name] if name in gathered else tensors[name].detach()
        memo[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    for buffer in skeleton.buffers():
        memo[id(buffer)] = buffer
    twin = _copied(skeleton, memo)
    twin.register_forward_pre_hook(_check_cache, with_kwargs=True)
    twin.register_forward_hook(_mark_cache)
    return twin


def _copied(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    """Return what `copy.deepcopy` does; most of a module are empty tables of hooks, which it takes long over."""
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
    for module in modules:
        copied = {
            name: type(value)() if isinstance(value, dict) and not value else copy.deepcopy(value, memo)
            for name, value in vars(module).items()
        }
        vars(memo[id(module)]).update(copied)
    twin = memo[id(model)]
    assert isinstance(twin, nn.Module)
    return twin


_SELECTED = "_lightning_prune_selection"  # on a small model and on the key/value caches that it filled: the digest


def _check_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a key/value cache that another model has filled."""
    cache = kwargs.get("past_key_values")
    if cache is None or torch.compiler.is_compiling() or getattr(cache, _SELECTED, None) == getattr(module, _SELECTED):
        return
    if int(cache.get_seq_length()):
        raise ValueError(
            "this key/value cache was filled by another model, or under another instruction than this sub-model was "
            "selected for; start with an empty cache"
        )


def _mark_cache(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    cache = getattr(output, "past_key_values", None)
    if cache is not None and not torch.compiler.is_compiling():
        setattr(cache, _SELECTED, getattr(module, _SELECTED))
