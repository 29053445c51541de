"""Rate experts by how many calibration tokens their routers send to them.

What a router chooses is seen as it chooses, so that biases and groups of experts count as they do in use.

Source: Muzio et al., SEER-MoE, arXiv 2404.05089, heavy-hitters counting; here within one layer, where the paper also
    ranks over all. Differences: padding is left out.
Cost: none beside the pass that is made anyway.
Limits: routers that choose by `topk`.

Shapes: E experts, T tokens, K chosen ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import distributed
from lightning_prune.structured.discovery.routing import Pick, watching_picks
from lightning_prune.structured.groups import Group

__all__ = ["expert_usage"]


def expert_usage(
    model: nn.Module, called: nn.Module, groups: Sequence[Group], run: Callable[[], None]
) -> dict[str, Tensor]:
    """Return `Group.key` -> count_E, float64: how many tokens each expert was chosen for while something ran.

    Args:
        model: holds the experts.
        called: what is called with the `attention_mask` of every batch.
        groups: of whole experts.
        run: runs batches through the model, or a part of it.

    Raises:
        ValueError: if a router was not seen to choose among its experts.
    """
    counts = {group.key: torch.zeros(group.num_units, dtype=torch.float64) for group in groups}
    masks: dict[str, Tensor | None] = {"attention_mask": None}

    def next_batch(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        collect()
        masks["attention_mask"] = kwargs.get("attention_mask")

    def collect() -> None:
        for group in groups:
            for pick in picks[group.key]:
                if pick.shape[-1] == group.num_units:
                    counts[group.key] += _counted(pick, masks["attention_mask"]).cpu()
            picks[group.key].clear()

    with watching_picks(model, groups) as picks:
        handle = called.register_forward_pre_hook(next_batch, with_kwargs=True)
        try:
            run()
            collect()
        finally:
            handle.remove()
    for group in groups:
        counts[group.key] = distributed.sum_everywhere(counts[group.key])
        if not counts[group.key].any():
            raise ValueError(
                f"no token was seen to be sent to an expert of {group.key}: no batch reached its router, or it does "
                "not choose by topk; give batches that do, or use Magnitude, Random or Taylor"
            )
    return counts


def _counted(pick: Pick, attention_mask: Tensor | None) -> Tensor:
    """Return count_E of one choice, without padding."""
    indices_TK = pick.indices.reshape(-1, pick.number)
    if isinstance(attention_mask, Tensor) and attention_mask.numel() == len(indices_TK):
        indices_TK = indices_TK[attention_mask.reshape(-1).bool().to(indices_TK.device)]
    return torch.bincount(indices_TK.flatten(), minlength=pick.shape[-1]).double()
