"""Find what can be cut from a model by asking its configuration, and prove each finding on the model.

Every whole number of the configuration is doubled in turn and the class built on the meta device: the dimensions
that grow belong to that number. Inside a fused tensor the order of the units is not visible in a shape; the few
possible orders are tried, and the right one is that whose cut model computes the same as the model with these units
set to zero. What fails this test in every order is refused, with the reason.

Blocks that are built alike are proven on two of them, and on the whole model once. What holds for a few tokens is
proven again on more tokens than any window, chunk or period that the configuration names.

Cost: some dozens of builds on the meta device and forward passes over 12 tokens of a model of a few blocks, and per
kind of unit and per block of these a few over the long text; no gradients.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_prune.structured.build import build_smaller, check_whole
from lightning_prune.structured.discovery.blueprint import Blueprint, Change
from lightning_prune.structured.discovery.compensation import stream_compensations
from lightning_prune.structured.discovery.expert_mask import routed_around
from lightning_prune.structured.discovery.fields import FFN_WORDS, Count, Fields, HeadFields
from lightning_prune.structured.discovery.precision import precise
from lightning_prune.structured.discovery.probe import (
    TOLERANCE,
    decodes,
    difference,
    outputs,
    reached,
    told,
)
from lightning_prune.structured.discovery.probe_inputs import probes
from lightning_prune.structured.discovery.proposals import Proposal, Proposer
from lightning_prune.structured.discovery.roles import Roles
from lightning_prune.structured.discovery.routing import with_routing
from lightning_prune.structured.discovery.sample import sample_of, twin_of
from lightning_prune.structured.discovery.stack import (
    candidate_stacks,
    proven,
    why_kept,
)
from lightning_prune.structured.groups import Cut, Group, Kind, Member, Plan, zeroed
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["discover"]

_MAX_TRIES = 48  # orders of units tried for one field


def discover(
    model: nn.Module, inputs: Mapping[str, Tensor] | None = None, *, kinds: Sequence[str] | None = None
) -> Structure:
    """Find the groups and blocks of a model.

    Args:
        model: built from its configuration; whole tensors on one device, unwrapped. Unchanged.
        inputs: a small batch of keyword arguments of its forward; made up for models that read tokens or pixels.
        kinds: the kinds of units to look for, and `layers`; all if it is not given.

    Raises:
        ValueError: if the model cannot be rebuilt from its configuration, its tensors cannot be cut, or it changes its
            weights while it runs.
    """
    check_whole(model)
    twin, blueprint = twin_of(model, Blueprint(model))
    batches = probes(twin, inputs)
    first: Structure | None = None
    for stack in candidate_stacks(twin, blueprint):
        found = _explored(twin, blueprint, stack, batches, kinds)
        removable = found.stack is not None and bool(found.stack.removable)
        if removable or first is None:
            first = found
        if removable or (first.groups and "layers" not in (kinds or ("layers",))):
            break
    if first is None:
        first = _Explorer(precise(twin, blueprint), blueprint, None, batches).run(kinds)
    return first


def _explored(
    model: nn.Module,
    blueprint: Blueprint,
    stack: Stack,
    batches: Sequence[Mapping[str, Tensor]],
    kinds: Sequence[str] | None,
) -> Structure:
    """Return what can be cut, found in a sample of the model if the whole model bears that out, and else in itself."""
    sample, sample_stack, standing = sample_of(model, blueprint, stack, batches[0])
    found = _expanded(_found(sample, sample_stack, batches, kinds), stack, standing)
    if sample_stack.num_layers == stack.num_layers or found.stack is None or not found.stack.removable:
        return found
    moved = dataclasses.replace(found.stack, kept_always={})  # every block behind the first removed one moves up
    if why_kept(model, blueprint, moved, found.stack.removable[0], batches) is None:
        return found
    everyone = {layer: layer for layer in range(stack.num_layers)}
    return _expanded(_found(precise(model, blueprint), stack, batches, kinds), stack, everyone)


def _found(
    sample: nn.Module, stack: Stack, batches: Sequence[Mapping[str, Tensor]], kinds: Sequence[str] | None
) -> Structure:
    blueprint = Blueprint(sample)
    if kinds is None or "layers" in kinds:
        stack = proven(sample, blueprint, stack, batches)
    else:
        unproven = dict.fromkeys(range(stack.num_layers), "layers were not looked for")
        stack = dataclasses.replace(stack, kept_always=unproven)
    return _Explorer(sample, blueprint, stack, batches).run(kinds)


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
            inside = stack.layer_of(group.name)  # of a block that several places share: the first of them
            first = next((layer for layer, sampled in standing.items() if sampled == inside), None)
            name = group.name if first is None else stack.renamed(group.name, first)
            moved = dataclasses.replace(group, name=name, members=tuple(_spread(group.members, stack, standing)))
            groups[moved.key] = moved
    assert found.stack is not None
    stack = dataclasses.replace(
        stack,
        counters={layer: found.stack.counters[s] for layer, s in standing.items() if s in found.stack.counters},
        kept_always={
            layer: found.stack.kept_always[s] for layer, s in standing.items() if s in found.stack.kept_always
        },
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

    def __init__(
        self, model: nn.Module, blueprint: Blueprint, stack: Stack | None, batches: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.model, self.blueprint, self.stack = model, blueprint, stack
        self.probes = [{k: v.float() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
        self.fields, self.roles = Fields(blueprint), Roles(model)
        self.proposer = Proposer(self.roles, stack)
        self.intact = outputs(model, self.probes[0])
        if not bool(self.intact.isfinite().all()):
            raise ValueError(f"{type(model).__name__} gives infinite or undefined outputs on the probe")
        self.groups: dict[str, Group] = {}
        self.refused: dict[str, str] = {}

    def run(self, kinds: Sequence[str] | None) -> Structure:
        """Try all fields that may count units of these kinds."""
        wanted = set(kinds or (*get_args(Kind), "layers"))
        if self.stack is None:
            self.refused["layers"] = "no field of the configuration counts blocks that lie in a ModuleList"
        elif not self.stack.removable:
            self.refused["layers"] = next(iter(self.stack.kept_always.values()))
        for heads in self.fields.heads() if wanted & {"heads", "kv_groups"} else ():
            self.find_heads(heads)
        for count in self.fields.inner() if wanted & {"ffn", "channels", "experts"} else ():
            if _is_ffn(count.name) or wanted & {"channels", "experts"}:
                self.find_inner(count)
        for count in self.fields.hidden() if "hidden" in wanted else ():
            self.find_hidden(count)
        if "ffn" in wanted and not any(group.kind == "ffn" for group in self.groups.values()):
            reasons = [reason for name, reason in self.refused.items() if _is_ffn(name)]
            self.refused["ffn"] = reasons[0] if reasons else "no field of the configuration counts FFN units"
        return Structure(self.groups, self.stack, self.refused)

    def find_heads(self, fields: HeadFields) -> None:
        """Find query heads, and key/value groups where several heads share one."""
        heads, kv_heads, pins = fields.heads, fields.kv_heads, fields.pins
        num_heads = heads.at(None)
        num_groups = kv_heads.at(None) if kv_heads is not None else num_heads
        if kv_heads is None or num_groups == num_heads:
            counts = (heads,) if kv_heads is None else (heads, kv_heads)
            self.accept(Proposal("heads", counts, pins), self.fields.effect(counts, pins))
            return
        alone = self.fields.effect([heads], pins)
        if num_groups > 1:
            sizes = {} if alone is None else alone[0].per_unit(num_heads, alone[1])
            query_sizes = {place: size * num_heads // num_groups for place, size in sizes.items()}
            both = (kv_heads, heads)
            self.accept(Proposal("kv_groups", both, pins, query_sizes=query_sizes), self.fields.effect(both, pins))
        self.accept(Proposal("heads", (heads,), pins, num_parts=num_groups), alone)

    def find_inner(self, count: Count) -> None:
        """Find units inside of modules: those of FFNs, and the widths of other bottlenecks."""
        effect = self.fields.effect([count])
        if effect is None or not effect[0]:
            return
        if self.proposer.counts_experts(effect[0]):
            self.find_experts(count, *effect)
            return
        kind: Kind = "ffn" if _is_ffn(count.name) else "channels"
        self.accept(Proposal(kind, (count,)), effect)

    def find_experts(self, count: Count, change: Change, factor: float) -> None:
        """Find whole experts."""
        try:
            groups = with_routing(
                self.model, self.proposer.expert_groups(count, change, factor), self.probes[0], self.fields.flat
            )
            reason = self.why_wrong(groups)
        except ValueError as error:
            reason = str(error)
        if reason is None:
            self.groups.update({group.key: group for group in groups})
        else:
            self.refused.setdefault("experts", reason)

    def accept(self, proposal: Proposal, effect: tuple[Change, float] | None) -> None:
        """Accept the groups that a field counts if some order of their units is proven right."""
        label = proposal.kind if proposal.kind in ("heads", "kv_groups") else proposal.counts[0].name
        if effect is None or not effect[0]:
            self.refused.setdefault(
                label, f"no shape follows {proposal.names} alone; the head size is not a field of its own"
            )
            return
        reason: str | None = None
        try:
            for groups in itertools.islice(self.proposer.groups(proposal, *effect), _MAX_TRIES):
                failed = self.why_wrong(groups)
                if failed is None:
                    self.groups.update({group.key: group for group in groups})
                    self.refused.pop(label, None)
                    return
                reason = reason or failed
        except ValueError as error:
            reason = str(error)
        if proposal.kind != "channels":
            self.refused.setdefault(label, reason or "nothing was found to cut")

    def why_wrong(self, groups: Sequence[Group]) -> str | None:
        """Cut half of the units of every group; return what is wrong with the result, None if it is exact."""
        random_order = random.Random(0)
        by_key = {group.key: group for group in groups}
        fields = ", ".join(dict.fromkeys(name for group in groups for name in group.fields))
        try:
            cuts = tuple(Cut(group.key, _half(group, random_order)) for group in groups)
            plain = Structure(by_key, None)
            small = build_smaller(self.model, plain, Plan(cuts=cuts), share=True, blueprint=self.blueprint)
            for inputs in self.probes:
                got = outputs(small, inputs)
                with zeroed(self.model, by_key, cuts), routed_around(self.model, by_key, cuts):
                    expected = outputs(self.model, inputs)
                if inputs is self.probes[0] and torch.equal(expected, self.intact):
                    return "leaving them out changes nothing that the probe can see, so that nothing can be proven"
                gap = difference(got, expected)
                if not gap <= TOLERANCE:
                    return f"a cut model computes something else than a masked one (by {gap:.1e})"
        except Exception as error:  # noqa: BLE001 - whatever a class raises on wrong shapes, the proposal is wrong
            return told(error, f"{type(self.model).__name__} with half of {fields}")
        is_cached = groups[0].kind in ("heads", "kv_groups", "channels")
        is_lost = is_cached and not decodes(small, self.probes[0]) and decodes(self.model, self.probes[0])
        return "a cut model does not decode with its cache" if is_lost else None

    def find_hidden(self, count: Count) -> None:
        """Find the residual channels."""
        if "residual:hidden" in self.groups or not isinstance(count.value, int):
            return
        pins = self.fields.all_pins()
        effect = self.fields.effect([count], pins)
        try:
            if effect is None or not effect[0]:
                raise ValueError(f"no shape follows {count.name}")
            group = self.proposer.residual(count, *effect, pins)
            self.check_reached(group)
            embedding, head, last_norm = self.ends(group)
            norms = {member.name.rpartition(".")[0] for member in group.members if member.role == "norm"}
            epsilons = self.fields.epsilons(norms)
            reason = ""
            for proposal in stream_compensations(
                group, self.roles, epsilons=epsilons, embedding=embedding, head=head, last_norm=last_norm
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

    def check_reached(self, group: Group) -> None:
        """Check that the probe runs all that writes and reads the residual channels, in every part of the model.

        Raises:
            ValueError: naming a part that it does not run.
        """
        called = reached(self.model, self.probes)
        parts = [
            name
            for name, module in self.model.named_modules()
            if name and hasattr(module, "config") and any(True for _ in module.parameters())
        ]
        owners: dict[int, list[str]] = {}
        for name, tensor in self.roles.tensors.items():
            owners.setdefault(id(tensor), []).append(name.rpartition(".")[0])
        ends = [m.name for m in group.members if self.stack is None or self.stack.layer_of(m.name) is None]
        for names in (*([part] for part in parts), *(owners[id(self.roles.tensors[end])] for end in ends)):
            if not any(f"{other}.".startswith(f"{name}.") for other in called for name in names):
                raise ValueError(
                    f"the probe does not reach {names[0]}, so nothing is known of the residual channels there; pass "
                    "`inputs` to discover that it reads (an image or a sound beside the tokens)"
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
        try:
            outputs(self.model, self.probes[0])
        finally:
            for handle in handles:
                handle.remove()
        embedding = names.get(id(tensors[0]))
        return embedding, None if is_tied else names.get(id(tensors[1])), order[-1] if order else None


def _is_ffn(name: str) -> bool:
    return any(word in name.rpartition(".")[2] for word in FFN_WORDS)


def _half(group: Group, order: random.Random) -> tuple[int, ...]:
    size, step = group.num_units // group.num_parts, group.step // group.num_parts
    number = max(group.at_least(0) // group.num_parts, size // 2 // step * step)
    if number == size > 1:
        raise ValueError(_why_whole(group))
    kept = [part * size + unit for part in range(group.num_parts) for unit in sorted(order.sample(range(size), number))]
    return tuple(kept)


def _why_whole(group: Group) -> str:
    """Return why no unit of a group can go."""
    if group.at_least(0) == group.num_units > group.step:
        return group.min_reason
    return (
        f"the {group.num_units} units of {group.key} are as narrow as grouped matrix products of stacked experts run "
        f"(multiple_of={group.multiple_of})"
    )
