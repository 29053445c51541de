"""A model in full precision, and the buffers that a cast has rounded.

`model.to(dtype)` rounds every buffer; a model that is loaded in that dtype makes those that are not saved (rotary
frequencies, say) anew in full precision, as a smaller model does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.structured.build import build_smaller, parameters_on_meta
from lightning_prune.structured.discovery.blueprint import Blueprint
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.structure import Structure

__all__ = ["exact_buffers", "precise"]


def precise(model: nn.Module, blueprint: Blueprint) -> nn.Module:
    """Return the model in float32, in which a wrong cut cannot pass for rounding; itself if it is that already."""
    if not _is_short(model):
        return model
    return build_smaller(model, Structure({}), Plan(), blueprint=blueprint).float()


@contextmanager
def exact_buffers(model: nn.Module, blueprint: Blueprint) -> Iterator[None]:
    """Give buffers that are not saved, and that differ from what the class makes by rounding alone, their exact values.

    The very same buffers are put back when the block ends.
    """
    rounded: list[tuple[nn.Module, str, Tensor]] = []
    if _is_short(model):
        with parameters_on_meta():
            fresh: nn.Module = blueprint.model_class(blueprint.configuration({}))
        twins, persistent = dict(fresh.named_modules()), set(model.state_dict(keep_vars=True))
        for prefix, module in model.named_modules():
            for leaf, buffer in module._buffers.items():
                exact = twins[prefix]._buffers.get(leaf) if prefix in twins else None
                if buffer is None or exact is None or f"{prefix}.{leaf}" in persistent or exact.dtype == buffer.dtype:
                    continue
                if exact.shape == buffer.shape and torch.equal(exact.to(buffer), buffer):
                    rounded.append((module, leaf, buffer))
                    module._buffers[leaf] = exact.to(buffer.device)
    try:
        yield
    finally:
        for module, leaf, buffer in rounded:
            module._buffers[leaf] = buffer


def _is_short(model: nn.Module) -> bool:
    return any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
