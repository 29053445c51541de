"""Cut a model to shapes that differ per block, and prove that it computes what the masked model does.

The class of the result is the stock class with `PerLayerModel` mixed in. Its configuration has one entry per block
and size, so each group of units counts in a field of its own, and the smaller model is built like any other.

Limits: decoder or encoder models with one configuration and one stack of blocks. An attention can be left out where it
    is a module of its own that does not add the residual itself.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.integrations.per_layer.per_layer_share import build_shared
from lightning_prune.integrations.per_layer.per_layer_skip import (
    check_cache,
    drop_idle_norms,
    part_groups,
    removed_parts,
    stand_ins,
)
from lightning_prune.integrations.per_layer.per_layer_source import per_layer_classes, stock_class_of
from lightning_prune.structured.build import build_smaller, check_whole
from lightning_prune.structured.depth.bypass import PART_OF_KIND, SubBlock, bypassed
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.discovery.probe_inputs import probes
from lightning_prune.structured.groups import Group, Plan
from lightning_prune.structured.shrink import check_same, promised
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["build_per_layer"]

_OWN_FIELDS = ("model_type", "transformers_version", "per_layer_config", "per_layer_index", "auto_map", "architectures")


def build_per_layer(
    model: nn.Module,
    structure: Structure | None,
    plan: Plan,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    consume: bool = False,
) -> nn.Module:
    """Return a smaller model whose blocks have the shapes that a plan leaves to each.

    Args:
        model: whole tensors on one device, unwrapped; unchanged unless it is to be consumed.
        structure: what `discover` found in the model; found now if it is None.
        plan: what stays.
        inputs: a small batch of keyword arguments of its forward; made up for models that read tokens or pixels.
        consume: whether to empty the parent's tensors one by one as they are cut.

    Raises:
        ValueError: if the plan removes nothing or does not fit, or no shapes per block can be; nothing was changed.
        RuntimeError: if the smaller model computes something else than the masked one.
    """
    check_whole(model)
    structure = discover(model, inputs) if structure is None else structure
    batches = probes(model, inputs)
    short = batches[0]
    structure.check_effect(plan)
    stack = _only_stack(model, structure)
    _check_not_shared(model)
    if plan.share:
        return build_shared(model, _shared_values(model, stack, plan), plan, batches, consume=consume)
    groups = part_groups(model, structure, stack)
    removed = removed_parts(model, groups, stack, plan)
    with bypassed(model, groups, parts=removed):
        expected = promised(model, structure, plan, batches)
    small = None
    if not removed and plan.layers is None:
        small = _cut_natively(model, structure, stack, plan, consume=consume)
    if small is None:
        skip_parts = stand_ins(model, groups, stack, removed, short)
        small = _cut(model, structure, stack, plan, removed, skip_parts, consume=consume)
        drop_idle_norms(small, stack, short)
    check_same(small, batches, expected)
    check_cache(small, short)
    return small


def _only_stack(model: nn.Module, structure: Structure) -> Stack:
    config: Any = model.config
    stack = structure.stack
    name = type(model).__name__
    if stack is None:
        raise ValueError(f"{name} has no stack of blocks, so no shapes per block")
    counter = (getattr(config, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")
    if stack.field != counter or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"shapes per block need one stack that {counter} counts; in {name} it is {stack.field}; plan with a "
            "uniform budget"
        )
    return stack


def _check_not_shared(model: nn.Module) -> None:
    overrides: Mapping[int, Mapping[str, Any]] = getattr(model.config, "layer_overrides", {})
    for layer, fields in overrides.items():
        if "share_with" in fields:
            raise ValueError(
                f"block {layer} shares the matrices of block {fields['share_with']}, so its shapes cannot become its "
                "own; cut the model before its blocks share, or remove whole blocks with shrink"
            )


def _plain_values(model: nn.Module, stack: Stack) -> dict[str, Any]:
    """Return the fields of the stock configuration, and the lists of blocks as seen from the base model."""
    values = model.config.to_dict()  # type: ignore[union-attr, operator]
    base = f"{model.base_model_prefix}." if hasattr(model, str(model.base_model_prefix)) else ""
    return {name: value for name, value in values.items() if name not in _OWN_FIELDS} | {
        "block_lists": [container.removeprefix(base) for container in stack.containers],
    }


def _shared_values(model: nn.Module, stack: Stack, plan: Plan) -> dict[str, Any]:
    """Return the fields by which blocks share."""
    overrides = {share.layer: {"share_with": share.donor, "share_rank": share.rank} for share in plan.share}
    return _plain_values(model, stack) | {"per_layer_config": overrides, "skip_parts": {}}


def _cut_natively(
    model: nn.Module, structure: Structure, stack: Stack, plan: Plan, *, consume: bool
) -> nn.Module | None:
    """Return the smaller model in its stock class, unproven; None if the class reads no shapes per block."""
    if stock_class_of(type(model)) is not type(model):
        return None
    values = model.config.to_dict()  # type: ignore[union-attr, operator]
    try:
        own = {"per_layer_config": _spelled_out(structure, stack, values), "serialize_explicit_per_layer_config": True}
        blueprint = Blueprint(_on_meta(model, type(model), type(model.config), values | own))
        renamed = _renamed_fields(structure, stack, blueprint)
        small: Any = build_smaller(model, renamed, plan, consume=consume, blueprint=blueprint)
        del small.config.__dict__["serialize_explicit_per_layer_config"]  # blocks like the others need no entry on disk
        return small
    except Exception:  # noqa: BLE001 - a stock class that does not know shapes per block fails in its own way
        return None


def _cut(
    model: nn.Module,
    structure: Structure,
    stack: Stack,
    plan: Plan,
    removed: Sequence[SubBlock],
    skip_parts: Mapping[str, Mapping[str, str]],
    *,
    consume: bool,
) -> nn.Module:
    """Return the smaller model in a class with per-layer shapes, unproven."""
    stock_class = stock_class_of(type(model))
    if not stock_class.__module__.startswith("transformers."):
        raise ValueError(f"{stock_class.__name__} is no class of transformers itself, to build single blocks with")
    config_class, model_class = per_layer_classes(stock_class)
    values = model.config.to_dict()  # type: ignore[union-attr, operator]
    overrides = _spelled_out(structure, stack, values)
    for part in removed:
        fields = overrides[part.layer]
        fields["skip"] = sorted({*fields.get("skip", []), part.part})
        fields |= dict.fromkeys(_sizes_of(part, structure, model.config))
    wide_values = _plain_values(model, stack) | {"per_layer_config": overrides, "skip_parts": skip_parts}
    for group in structure.groups.values():
        if group.layer is not None:
            wide_values |= dict(group.pins)
    blueprint = Blueprint(_on_meta(model, model_class, config_class, wide_values))
    own = _renamed_fields(structure, stack, blueprint)
    cuts = tuple(cut for cut in plan.cuts if cut.group in own.groups or cut.group not in structure.groups)
    small = build_smaller(
        model, own, dataclasses.replace(plan, cuts=cuts, skip=()), consume=consume, blueprint=blueprint
    )
    _gather(small.config)
    return small


def _sizes_of(part: SubBlock, structure: Structure, config: Any) -> list[str]:
    """Return the fields that say how large a part of a block is, and nothing else in it."""
    here: set[str] = set()
    others: set[str] = set()
    for group in structure.groups.values():
        if group.layer == part.layer:
            names = {name.rpartition(".")[2] for name in group.fields}
            (here if PART_OF_KIND.get(group.kind) == part.part else others).update(names)
    if part.part == "attention":
        here.add((getattr(config, "attribute_map", None) or {}).get("num_attention_heads", "num_attention_heads"))
    return sorted(name for name in here - others if isinstance(config.to_dict().get(name), int))


def _on_meta(model: nn.Module, model_class: Any, config_class: Any, values: Mapping[str, Any]) -> nn.Module:
    """Return a class built without memory, which computes attention as the model does."""
    config = config_class.from_dict(dict(values))
    config._attn_implementation = model.config._attn_implementation  # type: ignore[union-attr]
    with torch.device("meta"):
        built: nn.Module = model_class(config)
    return built


def _spelled_out(structure: Structure, stack: Stack, values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return block -> all fields that count units in it, and what it leaves out."""
    result: dict[int, dict[str, Any]] = {layer: {} for layer in range(stack.num_layers)}
    for layer, fields in (values.get("per_layer_config") or {}).items():
        result[int(layer)] |= fields
    for group in structure.groups.values():
        for name in group.fields if group.layer is not None else ():
            if name.startswith("per_layer_config.") or isinstance(values.get(name), list):
                continue
            if name not in values:
                raise ValueError(
                    f"{name} lies in a sub-configuration, where blocks are alike; plan with a uniform budget"
                )
            for fields in result.values():
                fields.setdefault(name, values[name])
    return result


def _renamed_fields(structure: Structure, stack: Stack, blueprint: Blueprint) -> Structure:
    """Return the structure, every group of a block counted by the fields of that block, and what was left out gone."""
    keys = {int(key): key for key in blueprint.values["per_layer_config"]}
    groups: dict[str, Group] = {}
    for key, group in structure.groups.items():
        fields = dict(group.fields)
        if group.layer is not None:
            fields = {_field_of(name, group.layer, keys, blueprint): step for name, step in fields.items()}
        members = tuple(member for member in group.members if member.name in blueprint.shapes)
        if members:
            groups[key] = dataclasses.replace(group, fields=fields, members=members)
    per_block = [name for name in stack.lists if not name.startswith("per_layer_config.")]
    lists = tuple(dict.fromkeys((*per_block, "per_layer_index")))
    return Structure(groups, dataclasses.replace(stack, lists=lists), structure.refused)


def _field_of(name: str, layer: int, keys: Mapping[int, str], blueprint: Blueprint) -> str:
    if name.startswith("per_layer_config."):
        _, key, leaf = name.split(".")
        return f"per_layer_config.{keys[int(key)]}.{leaf}"
    own = layer in keys and name in blueprint.values["per_layer_config"][keys[layer]]
    return f"per_layer_config.{keys[layer]}.{name}" if own else name


def _gather(config: Any) -> None:
    """Move the fields that are the same in all blocks to the configuration itself."""
    overrides = config.layer_overrides
    names = {name for fields in overrides.values() for name in fields if name != "skip"}
    for name in sorted(names):
        layers = range(config.num_hidden_layers)
        values = [overrides.get(layer, {}).get(name, getattr(config, name)) for layer in layers]
        sizes = [value for value in values if value is not None]
        if sizes and all(size == sizes[0] for size in sizes):
            setattr(config, name, sizes[0])
        for fields in overrides.values():
            if name in fields and fields[name] == getattr(config, name):
                del fields[name]
    config.per_layer_config = {layer: fields for layer, fields in overrides.items() if fields}
