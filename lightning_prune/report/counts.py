"""What was pruned: counts, bytes and FLOPs, read from the weights as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.base.types import Report, TargetReport
from lightning_prune.targets.targets import Binding, is_linear

__all__ = ["measure"]


def _count(parameter: Tensor) -> int:
    """Count the non-zeros of a whole parameter; collective when it is sharded."""
    count = torch.count_nonzero(distributed.local(parameter.detach()))
    return int(distributed.all_reduce_sum(count, parameter))


def _active_share(model: nn.Module) -> float:
    """Return the share of experts a token passes through, 1.0 without experts."""
    config = getattr(model, "config", None)
    active = getattr(config, "num_experts_per_tok", None)
    total = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return active / total if active and total else 1.0


def measure(model: nn.Module, bindings: Sequence[Binding], *, step: int, notes: Sequence[str] = ()) -> Report:
    """Count what is left of a model; collective when it is sharded.

    FLOPs per token are two for each weight of a linear layer or stacked expert that a token passes through; attention
    scores and convolutions are left out.
    """
    distributed.reshard(model)
    counts = {id(parameter): _count(parameter) for parameter in model.parameters()}
    sizes = {id(parameter): torch.Size(parameter.shape).numel() for parameter in model.parameters()}
    width = {id(parameter): parameter.element_size() for parameter in model.parameters()}
    flops = nonzero_flops = 0.0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            stacked = parameter.ndim == 3 and not is_linear(module)
            if (is_linear(module) and parameter.ndim == 2) or stacked:
                share = _active_share(model) if stacked else 1.0
                flops += 2 * share * sizes[id(parameter)]
                nonzero_flops += 2 * share * counts[id(parameter)]
    targets = tuple(
        TargetReport(
            name=binding.name,
            shape=tuple(binding.parameter.shape),
            num_weights=sizes[id(binding.parameter)],
            num_zeros=sizes[id(binding.parameter)] - counts[id(binding.parameter)],
        )
        for binding in bindings
    )
    return Report(
        step=step,
        targets=targets,
        num_parameters=sum(sizes.values()),
        num_nonzeros=sum(counts.values()),
        num_bytes=sum(sizes[key] * width[key] for key in sizes),
        num_bytes_nonzero=sum(counts[key] * width[key] for key in sizes),
        flops_per_token=round(flops),
        flops_per_token_nonzero=round(nonzero_flops),
        notes=tuple(notes),
    )
