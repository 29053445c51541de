"""Rate experts by how many calibration tokens their routers send to them.

What a router chooses is seen as it chooses, so that biases and groups of experts count as they do in use.

Source: Muzio et al., SEER-MoE, arXiv 2404.05089, heavy-hitters counting; here within one layer, where the paper also
    ranks over all. Differences: padding is left out.
Cost: none beside the pass that is made anyway.
Limits: routers that choose by `topk`.

Shapes: E experts, T tokens, K chosen ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.base import distributed
from lightning_prune.calibration.calls import Calls
from lightning_prune.structured.discovery.routing import Pick, watching_picks
from lightning_prune.structured.groups import Group

__all__ = ["expert_usage"]


def expert_usage(
    model: nn.Module, called: nn.Module | Calls, groups: Sequence[Group], run: Callable[[], None]
) -> dict[str, Tensor]:
    """Return `Group.key` -> count_E, float64: how many tokens each expert was chosen for while something ran.

    Args:
        model: holds the experts.
        called: what is called; or its calls, where they are followed already.
        groups: of whole experts.
        run: runs batches through the model, or a part of it.

    Raises:
        ValueError: if a router was not seen to choose among its experts.
    """
    calls = called if isinstance(called, Calls) else Calls(called)
    handles = [] if calls is called else list(calls.handles)
    with watching_picks(model, groups) as picks:
        counting = [_Counting(group, calls, picks[group.key]) for group in groups]
        for each in counting:
            module = model.get_submodule(each.group.name)
            handles += [module.register_forward_pre_hook(each.enter), module.register_forward_hook(each.leave)]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    for each in counting:
        each.count_E = distributed.sum_everywhere(each.count_E)
        if not each.count_E.any():
            raise ValueError(
                f"no token was seen to be sent to an expert of {each.group.key}: no batch reached its router, or it "
                "does not choose by topk; give batches that do, or use Magnitude, Random or Taylor"
            )
    return {each.group.key: each.count_E for each in counting}


class _Counting:
    """Counts what the router of one group chooses, call by call."""

    def __init__(self, group: Group, calls: Calls, picks: list[Pick]) -> None:
        self.group, self.calls, self.picks = group, calls, picks
        self.count_E = torch.zeros(group.num_units, dtype=torch.float64)
        self.keep: Tensor | None = None

    def enter(self, module: nn.Module, args: object) -> None:
        """Note which tokens of the call that begins are real."""
        call = self.calls.innermost
        self.keep = None if call is None else call.keep()

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """Count what was chosen in the call that ends."""
        for pick in self.picks:
            if pick.shape[-1] == self.group.num_units:
                self.count_E += _counted(pick, self.keep).cpu()
        self.picks.clear()


def _counted(pick: Pick, keep: Tensor | None) -> Tensor:
    """Return count_E of one choice, without padding."""
    indices_TK = pick.indices.reshape(-1, pick.number)
    if keep is not None and keep.numel() == len(indices_TK):
        indices_TK = indices_TK[keep.reshape(-1).to(indices_TK.device)]
    return torch.bincount(indices_TK.flatten(), minlength=pick.shape[-1]).double()
