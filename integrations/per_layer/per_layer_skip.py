"""Leave attention or MLP out of single blocks: which modules go, and what stands for them.

Limits: an attention must be a module of its own that does not add the residual itself. An MLP that is no such module
    keeps its activations, over no units.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.calibration.walk import evaluating
from lightning_prune.integrations.per_layer.per_layer_model import Nothing
from lightning_prune.structured.depth.bypass import PART_OF_KIND, SubBlock, sub_blocks
from lightning_prune.structured.discovery.probe import difference, outputs, tolerance
from lightning_prune.structured.groups import Group, Member, Plan
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["check_cache", "drop_idle_norms", "part_groups", "removed_parts", "stand_ins"]

_PARTS = ("attention", "mlp")


def part_groups(model: nn.Module, structure: Structure, stack: Stack) -> list[Group]:
    """Return the groups, and one for every attention none of whose units can be cut.

    Such an attention is the module of a block that knows its place in the cache.
    """
    groups = list(structure.groups.values())
    known = {group.layer for group in groups if PART_OF_KIND.get(group.kind) == "attention"}
    for layer in set(range(stack.num_layers)) - known:
        for container in stack.containers:
            block = f"{container}.{layer}"
            for name, module in model.get_submodule(block).named_modules(prefix=block):
                if name != block and isinstance(getattr(module, "layer_idx", None), int):
                    names = [inner for inner, _ in module.named_parameters(prefix=name)]
                    members = tuple(Member(inner, 0, ((0, 1),), "out") for inner in names)
                    groups.append(Group(name, "heads", layer, 1, members))
    return groups


def removed_parts(model: nn.Module, groups: Sequence[Group], stack: Stack, plan: Plan) -> list[SubBlock]:
    """Return the sub-blocks to leave out of the blocks that stay.

    Raises:
        ValueError: if the model has no such sub-block, or what it holds is needed elsewhere.
    """
    layers = range(stack.num_layers) if plan.layers is None else plan.layers
    for layer, part in plan.skip:
        if part not in _PARTS or not 0 <= layer < stack.num_layers:
            raise ValueError(
                f"skip must name a block from 0 to {stack.num_layers - 1} and one of {', '.join(_PARTS)}, "
                f"got {(layer, part)}"
            )
    chosen = sorted(set(plan.skip))
    removed = [SubBlock(layer, part) for layer, part in chosen if layer in layers]  # type: ignore[arg-type]
    known = sub_blocks(model, groups) if removed else {}
    for sub_block in removed:
        if sub_block not in known:
            raise ValueError(f"{sub_block} cannot be removed: the block has no such part, or it was removed before")
    if getattr(model.config, "num_kv_shared_layers", 0) and any(found.part == "attention" for found in removed):
        raise ValueError("an attention whose keys other blocks use cannot be removed; remove MLPs alone")
    return removed


def stand_ins(
    model: nn.Module, groups: Sequence[Group], stack: Stack, removed: Sequence[SubBlock], inputs: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Return part -> module of a block -> what stands for it: see `Nothing`.

    Raises:
        ValueError: if no module is the part alone.
    """
    result: dict[str, dict[str, str]] = copy.deepcopy(getattr(model.config, "skip_parts", {}))
    known = sub_blocks(model, groups) if removed else {}
    names = {id(module): name for name, module in model.named_modules()}
    for part in removed:
        here = [g for g in groups if g.layer == part.layer and PART_OF_KIND.get(g.kind) == part.part]
        readers = [member.name.rpartition(".") for group in here for member in group.readers]
        projections = {owner for owner, _, leaf in readers if leaf == "weight"}  # no experts in one stacked tensor
        found = {names[id(module)] for module in known[part]}
        wanted = result.setdefault(part.part, {})
        if not found <= projections:
            tops = {_child_of_block(name, stack) for name in found}
            wanted |= {_in_block(name, stack): kind for name, kind in _kinds(model, tops, inputs).items()}
            continue
        roles = {member.name.rpartition(".")[0]: member.role for group in here for member in group.members}
        if part.part == "attention" or set(roles.values()) - {"in", "out", "vector"}:
            raise ValueError(f"{part} cannot be removed: no module of the block is this part alone")
        wanted |= {_in_block(name, stack): "tensor" if name in projections else "empty" for name in roles}
    return result


def _in_block(name: str, stack: Stack) -> str:
    """Return the name of a module as its block calls it."""
    for container in stack.containers:
        if name.startswith(f"{container}."):
            return name[len(container) + 1 :].partition(".")[2]
    raise ValueError(f"{name} lies in no block")


def _child_of_block(name: str, stack: Stack) -> str:
    inner = _in_block(name, stack)
    return name.removesuffix(inner) + inner.partition(".")[0]


def _kinds(model: nn.Module, names: set[str], inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Return module -> `tensor` or `tuple N`, after what it gives in a forward pass."""
    result: dict[str, str] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            result[name] = f"tuple {len(output)}" if isinstance(output, tuple) else "tensor"

        return see

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in sorted(names)]
    try:
        outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return result


def drop_idle_norms(small: nn.Module, stack: Stack, inputs: Mapping[str, Tensor]) -> None:
    """Remove the norms that only fed a part that is gone; unused parameters stop distributed training."""
    config: Any = small.config
    skipping = {layer: config.skipped(layer) for layer in config.layer_overrides if config.skipped(layer)}
    candidates: dict[str, nn.Module] = {
        name: module
        for name, module in small.named_modules()
        if stack.layer_of(name) in skipping and module._parameters and all(p.ndim == 1 for p in module.parameters())
    }
    if not candidates:
        return
    idle = _without_gradient(small, candidates, inputs)
    before = copy.deepcopy(config.skip_parts)
    for layer, parts in skipping.items():
        here = sorted(_in_block(name, stack) for name in idle if stack.layer_of(name) == layer)
        stand_ins_here = config.skip_parts.setdefault(parts[0] if len(parts) == 1 else "both", {})
        stand_ins_here |= dict.fromkeys(here, "identity")
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for layer in skipping:
        for container in stack.containers:
            block = small.get_submodule(f"{container}.{layer}")
            for name in (n for n, kind in config.stand_ins(layer).items() if kind == "identity"):
                parent, _, leaf = name.rpartition(".")
                owner = block.get_submodule(parent)
                replaced.append((owner, leaf, getattr(owner, leaf)))
                setattr(owner, leaf, Nothing("identity"))
    try:
        outputs(small, inputs)
    except AttributeError:  # the block looks at the norm itself, for example at the type of its weight
        config.skip_parts = before
        for owner, leaf, norm in replaced:
            setattr(owner, leaf, norm)


def _without_gradient(small: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> set[str]:
    """Return the modules whose parameters the output does not depend on."""
    needed = {id(p): p.requires_grad for p in small.parameters()}
    parameters = [(name, p) for name, module in modules.items() for p in module.parameters()]
    try:
        small.requires_grad_(False)
        for _, parameter in parameters:
            parameter.requires_grad_(True)
        with evaluating(small), torch.enable_grad():
            output = small(**inputs)[0]
            if not output.requires_grad:
                return set(modules)
            loss = output.float().square().sum()
            gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    finally:
        for parameter in small.parameters():
            parameter.requires_grad_(needed[id(parameter)])
    used = {name for (name, _), gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    return set(modules) - used


@torch.no_grad()
def check_cache(small: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Check that a model without some attentions reads a sequence in two pieces as it reads it in one.

    Raises:
        RuntimeError: if it does not.
    """
    config: Any = small.config
    tokens = inputs.get("input_ids")
    is_whole = not any(
        "attention" in fields.get("skip", ()) for fields in getattr(config, "layer_overrides", {}).values()
    )
    if is_whole or tokens is None or len(inputs) > 1 or not getattr(config, "use_cache", False):
        return
    half = tokens.shape[1] // 2
    with evaluating(small):
        whole = small(input_ids=tokens, use_cache=True)
        first = small(input_ids=tokens[:, :half], use_cache=True)
        logits = whole.get("logits") if isinstance(whole, Mapping) else None
        if logits is None or logits.shape[:2] != tokens.shape or first.get("past_key_values") is None:
            return
        second = small(input_ids=tokens[:, half:], past_key_values=first["past_key_values"], use_cache=True)
    gap = difference(torch.cat([first["logits"], second["logits"]], dim=1), logits)
    if not gap <= 10 * tolerance(logits):
        raise RuntimeError(
            f"{type(small).__name__} computes something else with its cache than without (by {gap:.2g} of the largest "
            "output); keep the attentions of the first blocks"
        )
