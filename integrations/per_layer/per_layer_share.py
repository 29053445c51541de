"""Build a model whose blocks share matrices, in a class that saves and loads them once.

Limits: equal blocks of a stock class; what else a plan may cut is done in a run of its own, before.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.integrations.per_layer.per_layer_source import per_layer_classes, stock_class_of
from lightning_prune.structured.build import parameters_on_meta
from lightning_prune.structured.depth.share import check_shares, materialised, shared_factors
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.discovery.precision import exact_buffers
from lightning_prune.structured.discovery.probe import difference, outputs, tolerance
from lightning_prune.structured.groups import Plan
from lightning_prune.targets.targets import find_blocks

__all__ = ["build_shared"]


def build_shared(
    model: nn.Module, values: Mapping[str, Any], plan: Plan, batches: Sequence[Mapping[str, Tensor]], *, consume: bool
) -> nn.Module:
    """Return a model whose blocks share as a plan says; its normalisations are neutral.

    Args:
        model: of a stock class; unchanged.
        values: of the configuration, the per-layer entries included.
        plan: with shares alone.
        batches: on which the two are compared.
        consume: whether the result may hold the model's own tensors.

    Raises:
        ValueError: if the blocks cannot share, or the plan asks for more.
        RuntimeError: if the result computes something else than the model with the sums of the matrices.
    """
    stock_class: Any = stock_class_of(type(model))
    if stock_class is not type(model) or not stock_class.__module__.startswith("transformers."):
        raise ValueError(f"{type(model).__name__} is no class of transformers itself; share blocks of a stock model")
    if plan.cuts or plan.skip or plan.layers is not None:
        raise ValueError("a plan that lets blocks share cuts nothing else; cut first, and share in a second run")
    check_shares(model, plan.share)
    with exact_buffers(model, Blueprint(model)), materialised(model, plan.share):
        expected = [outputs(model, batch) for batch in batches]
    shared = _filled(model, values, plan, consume=consume)
    for batch, tensor in zip(batches, expected, strict=True):
        gap = difference(outputs(shared, batch), tensor)
        if not gap <= tolerance(tensor):
            raise RuntimeError(
                f"the {type(model).__name__} with shared blocks differs from the one with their sums by {gap:.2g} of "
                f"the largest output, more than {tolerance(tensor):g}"
            )
    return shared


def _filled(model: nn.Module, values: Mapping[str, Any], plan: Plan, *, consume: bool) -> nn.Module:
    parent: Any = type(model)
    config_class, model_class = per_layer_classes(parent)
    config = config_class.from_dict(dict(values))
    config._attn_implementation = model.config._attn_implementation  # type: ignore[union-attr]
    with parameters_on_meta():
        shared: nn.Module = model_class(config)
    own = model.state_dict(keep_vars=True) | _factors(model, shared, plan)
    copies: dict[int, Tensor] = {}  # tied parameters stay one
    for name, new in shared.state_dict(keep_vars=True).items():
        old = own.get(name)
        if old is None:  # scale and shift of an update
            own[name] = _parameter(torch.ones(new.shape) if name.endswith(".scale") else torch.zeros(new.shape), model)
        elif id(old) not in copies:
            data = old.detach() if consume else old.detach().clone()
            copies[id(old)] = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
    filled = {name: copies.get(id(own[name]), own[name]) for name in shared.state_dict(keep_vars=True)}
    shared.load_state_dict(filled, strict=True, assign=True)
    for name, buffer in shared.named_buffers():
        if name not in filled:  # tables that are made, not saved
            parent, _, leaf = name.rpartition(".")
            shared.get_submodule(parent)._buffers[leaf] = buffer.to(next(model.parameters()).device)
    shared.generation_config = copy.deepcopy(model.generation_config)
    return shared.train(model.training)


def _parameter(data: Tensor, model: nn.Module) -> nn.Parameter:
    like = next(model.parameters())
    return nn.Parameter(data.to(device=like.device, dtype=like.dtype))


def _factors(model: nn.Module, shared: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """Return name in the new model -> factor."""
    names = {id(module): name for name, module in shared.named_modules()}
    blocks = find_blocks(shared)
    result: dict[str, nn.Parameter] = {}
    for share in plan.share:
        for layer, (b_OR, a_RI) in shared_factors(model, share).items():
            path = f"{names[id(blocks[share.layer])]}.{layer}"
            result[f"{path}.factor_b"] = _parameter(b_OR.contiguous(), model)
            result[f"{path}.factor_a"] = _parameter(a_RI.contiguous(), model)
    return result
