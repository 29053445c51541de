"""Cut the units that training has masked out of a copy of the model; the model itself keeps its shape.

The copy is built from the configuration and takes the tensors it is given, so that it does not matter how a trainer has
wrapped, sharded or compiled its model. What can be cut is found while the copy's weights are still random: where
weights are zero, nothing can be told from outputs.

Cost: one more model in memory, on the CPU, and `discover`.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.structured.build import check_whole
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.from_zeros import can_fall, plan_from_zeros
from lightning_prune.structured.groups import Plan
from lightning_prune.structured.shrink import shrink
from lightning_prune.targets.targets import Binding

__all__ = ["check_masks_cut_units", "cut_zeros"]


def cut_zeros(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[nn.Module, Plan]:
    """Return a smaller model of the same class without the units that are zero, and the plan that cut it.

    Args:
        model: gives class and configuration; unchanged.
        state: its tensors, whole.

    Raises:
        ValueError: if the class cannot be rebuilt, or nothing is zero that could be cut.
        RuntimeError: if the smaller model computes something else than the masked one.
    """
    if any(".base_layer." in name for name in state):
        raise ValueError("shrink cuts the model below its adapters; merge them first (merge_and_unload), or remove")
    config: Any = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]):
        model_class: Any = type(model)
        fresh: Any = model_class(config)
        structure = discover(fresh)
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    fresh.load_state_dict(tensors, assign=True)
    fresh.tie_weights()
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        fresh.generation_config = generation
    plan = plan_from_zeros(fresh.eval(), structure)
    return shrink(fresh, plan, structure=structure, consume=True), plan


def check_masks_cut_units(model: nn.Module, bindings: Iterable[Binding], width: int) -> None:
    """Check, before time is spent on training, that masks of these columns can end in units that are cut.

    Nothing is checked where the model is sharded or compiled, or some columns are zero already.

    Args:
        model: the model that will be trained; unchanged.
        bindings: the targets of the masks.
        width: columns that are masked together.

    Raises:
        ValueError: if a target reads no units that can be cut, or masks are narrower than its units.
    """
    found = list(bindings)
    if any(distributed.is_sharded(b.parameter) or _has_zero_columns(b) for b in found) or _is_compiled(model):
        return
    check_whole(model)
    with torch.random.fork_rng(devices=[]):
        structure = discover(model)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    sizes: dict[str, int] = {}
    for group in structure.groups.values():
        for member in group.readers if can_fall(group) else ():
            size = member.runs[0][1]
            sizes[member.name] = min(size, sizes.get(member.name, size))
    for binding in found:
        size_of = sizes.get(names.get(id(binding.parameter), binding.name))
        if size_of is None:
            reasons = "; ".join(f"{kind}: {reason}" for kind, reason in structure.refused.items())
            raise ValueError(
                f"shrink.zeros cannot cut what masks on {binding.name} leave behind: it reads no units that can be cut "
                f"({reasons or 'cut are ' + ', '.join(structure.kinds)}); exclude it from prune.targets, which should "
                f"be among {', '.join(sorted(sizes)[:4]) or 'nothing in this model'}"
            )
        if width % size_of:
            raise ValueError(
                f"units of {binding.name} are {size_of} columns wide, masks of granularity Channel {width}; set "
                f"prune.granularity.width to {size_of} to cut whole units"
            )


def _is_compiled(model: nn.Module) -> bool:
    return any(getattr(module, "_compiled_call_impl", None) for module in model.modules())


@torch.no_grad()
def _has_zero_columns(binding: Binding) -> bool:
    weight_OI = binding.to_matrix(binding.parameter.detach())
    return bool((weight_OI == 0).all(0).any())
