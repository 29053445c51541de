"""Find the repeated blocks of a model, what counts them, and which of them can be removed."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.structured.build import build_smaller
from lightning_prune.structured.discovery.blueprint import Blueprint, leaves, text_path
from lightning_prune.structured.discovery.lists import lists_per_block
from lightning_prune.structured.discovery.probe import decodes, difference, outputs, skipping, told, tolerance
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["blocks_of", "candidate_stacks", "proven", "representatives", "why_kept"]


def candidate_stacks(model: nn.Module, blueprint: Blueprint) -> Iterator[Stack]:
    """Yield the stacks that fields of the configuration may count: of the text part first, then by parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    flat, text = dict(leaves(blueprint.values)), text_path(blueprint.config)
    found: list[tuple[bool, int, Stack]] = []
    for path, number in flat.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 2:
            continue
        counted = [
            name for name, module in lists.items() if len(module) == number and any(True for _ in module.parameters())
        ]
        outermost = tuple(name for name in counted if not any(name.startswith(f"{outer}.") for outer in counted))
        if not outermost:
            continue
        alike = {
            other: value
            for other, value in flat.items()
            if isinstance(value, list) and len(value) == number and other[0] != "per_layer_config"
        }
        per_layer = tuple(".".join(name) for name in lists_per_block(blueprint, path, number, outermost, alike))
        stack = Stack(outermost, ".".join(path), per_layer, number)
        owned = _owned(blueprint, stack)
        if owned:
            stack = dataclasses.replace(stack, containers=owned)
            size = sum(p.numel() for name in owned for p in lists[name].parameters())
            found.append((path[:-1] != text, -size, stack))
    for *_, stack in sorted(found, key=lambda entry: entry[:2]):
        yield stack


def _owned(blueprint: Blueprint, stack: Stack) -> tuple[str, ...]:
    """Return the containers that lose blocks, and nothing else does, when the field is one lower."""
    flat = dict(leaves(blueprint.values))
    for last in reversed(range(stack.num_layers)):
        keep = [layer for layer in range(stack.num_layers) if layer != last]
        edits = {
            tuple(name.split(".")): [flat[tuple(name.split("."))][layer] for layer in keep] for name in stack.lists
        }
        shapes = blueprint.shapes_with({tuple(stack.field.split(".")): stack.num_layers - 1, **edits})
        if shapes is None:
            continue
        lost = [name for name in blueprint.shapes if name not in shapes]
        if not lost or any(stack.layer_of(name) is None for name in lost):
            continue
        return tuple(c for c in stack.containers if any(name.startswith(f"{c}.") for name in lost))
    return ()


def blocks_of(model: nn.Module, stack: Stack, layer: int) -> list[nn.Module]:
    """Return the modules that make up one block."""
    return [model.get_submodule(f"{container}.{layer}") for container in stack.containers]


def proven(model: nn.Module, blueprint: Blueprint, stack: Stack, probes: Sequence[Mapping[str, Tensor]]) -> Stack:
    """Return the stack with the blocks that cannot be removed, and what else counts the others.

    Each block is removed alone, and the smaller model compared with the model that passes the block over.
    """
    reasons: dict[int, str] = {}
    counters: dict[int, tuple[str, ...]] = {}
    flat = dict(leaves(blueprint.values))
    other = [
        ".".join(path)
        for path, value in flat.items()
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= stack.num_layers
    ]
    for layer in range(stack.num_layers):
        reason = None
        for names in ((), *((name,) for name in other if name != stack.field)):
            candidate = dataclasses.replace(stack, counters={layer: names}, kept_always={})
            found = why_kept(model, blueprint, candidate, layer, probes)
            if found is None:
                counters[layer], reason = names, None
                break
            reason = reason or found
        if reason is not None:
            reasons[layer] = reason
    return dataclasses.replace(
        stack, counters={layer: names for layer, names in counters.items() if names}, kept_always=reasons
    )


def why_kept(
    model: nn.Module, blueprint: Blueprint, stack: Stack, layer: int, probes: Sequence[Mapping[str, Tensor]]
) -> str | None:
    """Return why a block cannot be removed, None if it can: on every probe the others compute what they did."""
    keep = tuple(other for other in range(stack.num_layers) if other != layer)
    what = f"{type(model).__name__} without block {layer}"
    is_seen = False
    try:
        small = build_smaller(model, Structure({}, stack), Plan(layers=keep), share=True, blueprint=blueprint)
        for inputs in probes:
            got = outputs(small, inputs)
            with skipping(blocks_of(model, stack, layer)):
                expected = outputs(model, inputs)
            is_seen = is_seen or not torch.equal(expected, outputs(model, inputs))
            gap = difference(got, expected)
            if not gap <= tolerance(expected):
                return f"the model computes something else without it (by {gap:.1e})"
    except Exception as error:  # noqa: BLE001 - whatever a class raises, the block stays, and the reason is told
        return told(error, what)
    if not is_seen:
        return "removing it changes nothing that the probe can see"
    is_lost = not decodes(small, probes[0]) and decodes(model, probes[0])
    return "the model cannot decode without it" if is_lost else None


def representatives(blueprint: Blueprint, model: nn.Module, stack: Stack) -> tuple[list[int], dict[int, int]]:
    """Return two blocks of each kind, and block -> the one of them that stands for it.

    The first of its kind stands for all but the last block of the model: what depends on the place of a block shows
    when a block before others is removed.
    """
    flat = dict(leaves(blueprint.values))
    kinds: dict[object, list[int]] = {}
    own: dict[int, list[int]] = {}
    for layer in range(stack.num_layers):
        shapes = {stack.renamed(n, 0): s for n, s in blueprint.shapes.items() if stack.layer_of(n) == layer}
        entries = tuple(repr(flat[tuple(name.split("."))][layer]) for name in stack.lists)
        types = tuple(type(module) for block in blocks_of(model, stack, layer) for module in block.modules())
        own[layer] = kinds.setdefault((tuple(sorted(shapes.items())), entries, types), [])
        if len(own[layer]) < 2:
            own[layer].append(layer)
    chosen = sorted(layer for same in kinds.values() for layer in same)
    if len(chosen) == stack.num_layers:
        return chosen, {layer: layer for layer in chosen}
    last = stack.num_layers - 1
    return chosen, {layer: same[-1] if layer == last else same[0] for layer, same in own.items()}
