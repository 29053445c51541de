"""Find what can be cut from a model by asking its configuration, and prove each finding on the model.

Every whole number of the configuration is doubled in turn and the class built on the meta device: the dimensions
that grow belong to that number. Inside a fused tensor the order of the units is not visible in a shape; the few
possible orders are tried, and the right one is that whose cut model computes the same as the model with these units
set to zero. What fails this test in every order is refused, with the reason.

Blocks that are built alike are proven on two of them.

Cost: some dozens of builds on the meta device and forward passes over 24 tokens of a model of a few blocks; no
gradients.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.structured.blueprint import Blueprint, Change
from lightning_prune.structured.compensation import compensations, stream_compensations
from lightning_prune.structured.fields import FFN_WORDS, Count, Fields, HeadFields
from lightning_prune.structured.groups import Cut, Group, Kind, Member, Plan, zeroed
from lightning_prune.structured.layouts import Runs, layouts
from lightning_prune.structured.probe import TOLERANCE, difference, outputs, probe_inputs, skipping
from lightning_prune.structured.roles import Dimension, Roles, partition
from lightning_prune.structured.build import build_smaller, check_whole
from lightning_prune.structured.stack import blocks_of, candidate_stacks, proven, representatives
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["discover"]

_MAX_TRIES = 48  # orders of units tried for one field
_MAX_FUSED = 4  # entries of one FFN unit in one tensor; more of them belong to something repeated inside the module


def discover(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Structure:
    """Find the groups and blocks of a model.

    Args:
        model: built from its configuration; whole tensors on one device, unwrapped. Unchanged.
        inputs: a small batch of keyword arguments of its forward; made up for models that read tokens or pixels.

    Raises:
        ValueError: if the model cannot be rebuilt from its configuration, or its tensors cannot be cut.
    """
    check_whole(model)
    inputs = probe_inputs(model) if inputs is None else inputs
    blueprint = Blueprint(model)
    first: Structure | None = None
    for stack in candidate_stacks(model, blueprint):
        sample, sample_stack, standing = _sample(model, blueprint, stack, inputs)
        sample_blueprint = blueprint if sample is model else Blueprint(sample)
        sample_stack = proven(sample, sample_blueprint, sample_stack, inputs)
        if sample_stack.removable or first is None:
            found = _Explorer(sample, sample_blueprint, sample_stack, inputs).run()
            first = _expanded(found, stack, standing)
        if sample_stack.removable:
            break
    if first is None:
        first = _Explorer(model, blueprint, None, inputs).run()
    return first


def _sample(
    model: nn.Module, blueprint: Blueprint, stack: Stack, inputs: Mapping[str, Tensor]
) -> tuple[nn.Module, Stack, dict[int, int]]:
    """Return a model of a few blocks that stand for all, its stack, and block -> the sample's block for it."""
    standing = representatives(blueprint, model, stack)
    chosen = sorted(set(standing.values()))
    if len(chosen) < stack.num_layers:
        others = [b for layer in standing if layer not in chosen for b in blocks_of(model, stack, layer)]
        try:
            small = build_smaller(model, Structure({}, stack), Plan(layers=tuple(chosen)), share=True, blueprint=blueprint)
            one = {name: value[:1] for name, value in inputs.items()}
            with skipping(others):
                expected = outputs(model, one)
            if difference(outputs(small, one), expected) <= TOLERANCE:
                position = {layer: index for index, layer in enumerate(chosen)}
                short = dataclasses.replace(stack, num_layers=len(chosen))
                return small, short, {layer: position[other] for layer, other in standing.items()}
        except Exception:  # noqa: BLE001 - blocks that depend on their place: the whole model is its own sample
            pass
    return model, stack, {layer: layer for layer in standing}


def _expanded(found: Structure, stack: Stack, standing: Mapping[int, int]) -> Structure:
    """Return what was found in a sample for all blocks of the model."""
    groups: dict[str, Group] = {}
    for layer, sampled in standing.items():
        for group in found.groups.values():
            if group.layer == sampled:
                members = tuple(dataclasses.replace(m, name=stack.renamed(m.name, layer)) for m in group.members)
                moved = dataclasses.replace(group, name=stack.renamed(group.name, layer), layer=layer, members=members)
                groups[moved.key] = moved
    for group in found.groups.values():
        if group.layer is None:
            groups[group.key] = dataclasses.replace(group, members=tuple(_spread(group.members, stack, standing)))
    assert found.stack is not None
    stack = dataclasses.replace(
        stack,
        counters={layer: found.stack.counters[s] for layer, s in standing.items() if s in found.stack.counters},
        kept_always={layer: found.stack.kept_always[s] for layer, s in standing.items() if s in found.stack.kept_always},
    )
    return Structure(groups, stack, found.refused)


def _spread(members: Iterable[Member], stack: Stack, standing: Mapping[int, int]) -> Iterator[Member]:
    for member in members:
        inside = stack.layer_of(member.name)
        if inside is None:
            yield member
        for layer, sampled in standing.items():
            if sampled == inside:
                yield dataclasses.replace(member, name=stack.renamed(member.name, layer))


class _Explorer:
    """Tries the fields of one model's configuration."""

    def __init__(self, model: nn.Module, blueprint: Blueprint, stack: Stack | None, inputs: Mapping[str, Tensor]) -> None:
        self.model, self.blueprint, self.stack, self.inputs = model, blueprint, stack, inputs
        self.fields, self.roles = Fields(blueprint), Roles(model)
        self.intact = outputs(model, inputs)
        if not bool(self.intact.isfinite().all()):
            raise ValueError(f"{type(model).__name__} gives infinite or undefined outputs on the probe; check its weights")
        self.groups: dict[str, Group] = {}
        self.refused: dict[str, str] = {}

    def run(self) -> Structure:
        """Try all fields."""
        if self.stack is None:
            self.refused["layers"] = "no field of the configuration counts blocks that lie in a ModuleList"
        elif not self.stack.removable:
            self.refused["layers"] = next(iter(self.stack.kept_always.values()))
        for heads in self.fields.heads():
            self.find_heads(heads)
        for count in self.fields.inner():
            self.find_inner(count)
        for count in self.fields.hidden():
            self.find_hidden(count)
        return Structure(self.groups, self.stack, self.refused)

    def find_heads(self, fields: HeadFields) -> None:
        """Find query heads, and key/value groups where several heads share one."""
        heads, kv_heads, pins = fields.heads, fields.kv_heads, fields.pins
        num_heads = heads.at(None)
        num_groups = kv_heads.at(None) if kv_heads is not None else num_heads
        alone = self.fields.effect([heads], pins)
        if num_groups == num_heads or kv_heads is None:
            counts = [heads] if kv_heads is None else [heads, kv_heads]
            self.try_field("heads", counts, self.fields.effect(counts, pins), pins)
            return
        if num_groups > 1:
            query = {place: (after - before) // num_heads for place, (before, after) in (alone or ({}, 2))[0].items()}
            self.try_field(
                "kv_groups",
                [kv_heads, heads],
                self.fields.effect([kv_heads, heads], pins),
                pins,
                query={place: size * num_heads // num_groups for place, size in query.items()},
            )
        self.try_field("heads", [heads], alone, pins, num_parts=num_groups)

    def find_inner(self, count: Count) -> None:
        """Find units inside of modules: those of FFNs, and the widths of other bottlenecks."""
        effect = self.fields.effect([count])
        if effect and effect[0]:
            kind: Kind = "ffn" if any(word in count.path[-1] for word in FFN_WORDS) else "channels"
            self.try_field(kind, [count], effect, {})

    def try_field(
        self,
        kind: Kind,
        counts: Sequence[Count],
        effect: tuple[Change, float] | None,
        pins: Mapping[tuple[str, ...], int],
        *,
        num_parts: int = 1,
        query: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        """Accept the groups that a field counts if some order of their units is proven right."""
        label = kind if kind not in ("channels", "ffn") else counts[0].name
        if effect is None or not effect[0]:
            names = " and ".join(count.name for count in counts)
            self.refused.setdefault(label, f"no shape follows {names} alone; the head size is not a field of its own")
            return
        try:
            dimensions = self.dimensions(counts[0], *effect)
            if kind in ("ffn", "channels") and any(dimension.per_unit > _MAX_FUSED for dimension in dimensions):
                raise ValueError(f"{counts[0].name} is a size inside of heads or groups and counts no units")
            proposals = self.proposals(kind, counts, dimensions, pins, num_parts, query or {})
            reason = "no module both writes and reads them"
            for tried, groups in enumerate(itertools.islice(proposals, _MAX_TRIES)):
                failed = self.why_wrong(groups)
                if failed is None:
                    self.groups.update({group.key: group for group in groups})
                    self.refused.pop(label, None)
                    return
                reason = failed if tried == 0 else reason
        except ValueError as error:
            reason = str(error)
        if kind != "channels":
            self.refused.setdefault(label, reason)

    def dimensions(self, count: Count, change: Change, factor: float) -> list[Dimension]:
        """Return the changed dimensions as sizes per unit.

        Raises:
            ValueError: naming one that does not grow evenly.
        """
        result = []
        for (name, dim), (before, after) in change.items():
            number = count.at(self.layer(name))
            per_unit, odd = divmod(round(after - before), round(number * (factor - 1)))
            rest = before - per_unit * number
            if odd or per_unit < 1 or rest < 0:
                raise ValueError(f"{name} goes from {before} to {after} where {count.name} is multiplied by {factor}")
            result.append(Dimension(name, dim, per_unit, rest, self.roles.role(name, dim)))
        return result

    def proposals(
        self,
        kind: Kind,
        counts: Sequence[Count],
        dimensions: Sequence[Dimension],
        pins: Mapping[tuple[str, ...], int],
        num_parts: int,
        query: Mapping[tuple[str, int], int],
    ) -> Iterator[list[Group]]:
        """Yield the groups under every order of units and every way to make up for norms."""
        modules = list(partition(dimensions))
        if not modules:
            return
        places = {dimension.pattern: dimension for _, below in modules for dimension in below}
        orders = [
            list(dict.fromkeys(self.orders(kind, counts[0], dimension, query))) for dimension in places.values()
        ]
        unit = counts[0].at(None)
        fields = {count.name: max(1, count.at(None) // unit) for count in counts}
        for order in itertools.product(*orders):
            runs = dict(zip(places, order, strict=True))
            groups = [
                Group(
                    name=name,
                    kind=self.kind(kind, below),
                    layer=self.layer(name),
                    num_units=counts[0].at(self.layer(name)),
                    members=tuple(self.member(dimension, runs[dimension.pattern], expert) for dimension in below),
                    num_parts=num_parts,
                    fields=fields,
                    pins={".".join(path): value for path, value in pins.items()},
                )
                for module, below in modules
                for name, expert in self.experts(module, below)
            ]
            for made_up in zip(*(_padded(compensations(group, self.roles)) for group in groups), strict=False):
                if any(group is None for group in made_up):
                    break
                yield [group for group in made_up if group is not None]

    def orders(
        self, kind: Kind, count: Count, dimension: Dimension, query: Mapping[tuple[str, int], int]
    ) -> Iterator[Runs]:
        """Yield the orders that units of a dimension can have."""
        number = count.at(self.layer(dimension.name))
        size = query.get((dimension.name, dimension.dim), 0)
        return layouts(dimension, number, parts_first=kind in ("ffn", "channels"), query_size=size)

    def kind(self, kind: Kind, dimensions: Sequence[Dimension]) -> Kind:
        """Return the kind, where a module with a convolution over the units is no FFN."""
        is_convolved = any(isinstance(self.roles.owner(dimension.name), _ConvNd) for dimension in dimensions)
        return "channels" if kind == "ffn" and is_convolved else kind

    def experts(self, module: str, dimensions: Sequence[Dimension]) -> list[tuple[str, int | None]]:
        """Return the groups of one module: one, or one for each expert of stacked tensors."""
        stacked = [d for d in dimensions if self.roles.is_stacked(d.name) and d.dim > 0]
        if not stacked:
            return [(module, None)]
        if len(stacked) < len(dimensions) and any(self.roles.tensors[d.name].ndim != 2 for d in dimensions if d not in stacked):
            raise ValueError(f"{module} mixes stacked experts with other tensors over the same units")
        return [(f"{module}.{expert}", expert) for expert in range(self.roles.tensors[stacked[0].name].shape[0])]

    def member(self, dimension: Dimension, runs: Runs, expert: int | None) -> Member:
        """Return the slices of one tensor."""
        return Member(dimension.name, dimension.dim, runs, dimension.role, expert)

    def layer(self, name: str) -> int | None:
        """Return the block a tensor or module lies in."""
        return None if self.stack is None else self.stack.layer_of(name)

    def why_wrong(self, groups: Sequence[Group]) -> str | None:
        """Cut half of the units of every group; return what is wrong with the result, None if it is exact."""
        random_order = random.Random(0)
        by_key = {group.key: group for group in groups}
        cuts = tuple(Cut(group.key, _half(group, random_order)) for group in groups)
        try:
            plain = Structure(by_key, None)
            small = build_smaller(self.model, plain, Plan(cuts=cuts), share=True, blueprint=self.blueprint)
            got = outputs(small, self.inputs)
            with zeroed(self.model, by_key, cuts):
                expected = outputs(self.model, self.inputs)
        except Exception as error:  # noqa: BLE001 - whatever a class raises on wrong shapes, the proposal is wrong
            return " ".join(str(error).split()) or type(error).__name__
        if torch.equal(expected, self.intact):
            return "leaving them out changes nothing that the probe can see, so that nothing can be proven"
        gap = difference(got, expected)
        return None if gap <= TOLERANCE else f"a cut model computes something else than a masked one (by {gap:.1e})"

    def find_hidden(self, count: Count) -> None:
        """Find the residual channels."""
        if "residual:hidden" in self.groups or not isinstance(count.value, int):
            return
        pins = self.fields.all_pins()
        effect = self.fields.effect([count], pins)
        try:
            if effect is None or not effect[0]:
                raise ValueError(f"no shape follows {count.name}")
            group = self.residual(count, self.dimensions(count, *effect), pins)
            embedding, head, last_norm = self.ends(group)
            reason = ""
            for proposal in stream_compensations(
                group, self.roles, epsilons=self.fields.epsilons(), embedding=embedding, head=head, last_norm=last_norm
            ):
                failed = self.why_wrong([proposal])
                if failed is None:
                    self.groups[proposal.key] = proposal
                    self.refused.pop("hidden", None)
                    return
                reason = reason or failed
        except ValueError as error:
            reason = str(error)
        self.refused.setdefault("hidden", reason)

    def residual(
        self, count: Count, dimensions: Sequence[Dimension], pins: Mapping[tuple[str, ...], int]
    ) -> Group:
        """Return the group of residual channels.

        Raises:
            ValueError: if other widths follow the hidden size, or a norm subtracts the mean over channels.
        """
        for dimension in dimensions:
            if dimension.per_unit != 1 or dimension.rest:
                raise ValueError(f"{dimension.name} follows {count.name} too, and is not the residual stream alone")
            if dimension.role == "norm" and self.roles.norm(dimension.name)[0] == "mean":
                raise ValueError(f"{dimension.name} is a norm that subtracts the mean over all channels, gone ones too")
        return Group(
            name="residual",
            kind="hidden",
            layer=None,
            num_units=count.at(None),
            members=tuple(self.member(dimension, ((0, 1),), None) for dimension in dimensions),
            fields={count.name: 1},
            pins={".".join(path): value for path, value in pins.items()},
        )

    def ends(self, group: Group) -> tuple[str | None, str | None, str | None]:
        """Return the embedding's tensor, the output head's where it is another, and the norm before the head."""
        model: Any = self.model
        own = {member.name for member in group.members}
        names: dict[int, str] = {}  # a tied tensor goes by its first name
        for name, tensor in self.roles.tensors.items():
            if name in own:
                names.setdefault(id(tensor), name)
        getters: list[Callable[[], Any] | None] = [
            getattr(model, getter, None) for getter in ("get_input_embeddings", "get_output_embeddings")
        ]
        ends = [getter() if callable(getter) else None for getter in getters]
        tensors = [None if end is None else getattr(end, "weight", None) for end in ends]
        is_tied = tensors[0] is tensors[1]
        order: list[str] = []
        handles = [
            self.roles.owner(member.name).register_forward_hook(lambda *_, name=member.name: order.append(name))
            for member in group.members
            if member.role == "norm"
        ]
        outputs(self.model, self.inputs)
        for handle in handles:
            handle.remove()
        embedding = names.get(id(tensors[0]))
        return embedding, None if is_tied else names.get(id(tensors[1])), order[-1] if order else None


def _half(group: Group, order: random.Random) -> tuple[int, ...]:
    size = group.num_units // group.num_parts
    kept = [
        part * size + unit
        for part in range(group.num_parts)
        for unit in sorted(order.sample(range(size), max(1, size // 2)))
    ]
    return tuple(kept)


def _padded(groups: Iterator[Group]) -> Iterator[Group | None]:
    """Yield groups; the last one again and again if there is only one way."""
    known = list(groups)
    if len(known) == 1:
        yield from itertools.repeat(known[0], 9)
    yield from known if len(known) > 1 else ()
    yield None
