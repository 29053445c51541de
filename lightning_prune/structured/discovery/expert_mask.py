"""Simulate the removal of experts: their routers give them no share, so that no token is sent to them.

Setting weights to zero does not do that: a router row of zeros is a logit of zero, which may well win. What a router
computes is therefore changed as it is computed.

Shapes: E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.structured.groups import Cut, Group

__all__ = ["routed_around"]


class _RoutedAround(TorchFunctionMode):
    """Sets the logits of removed experts to minus infinity wherever a router's weight is multiplied."""

    def __init__(self, removed: Mapping[int, Tensor], num_experts: Mapping[int, int]) -> None:
        super().__init__()
        self.removed, self.num_experts = removed, num_experts

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute, and mask what comes out of a router."""
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            key = id(args[1])
            if key in self.removed and output.shape[-1] == self.num_experts[key]:
                return output.index_fill(-1, self.removed[key], -torch.inf)
        return output


@contextmanager
def routed_around(model: nn.Module, groups: Mapping[str, Group], cuts: Sequence[Cut]) -> Iterator[None]:
    """Let no token reach the removed experts, until the block ends."""
    tensors = model.state_dict(keep_vars=True)
    removed: dict[int, Tensor] = {}
    numbers: dict[int, int] = {}
    for cut in cuts:
        group = groups[cut.group]
        gone = sorted(set(range(group.num_units)) - set(cut.keep))
        if group.kind != "experts" or not gone:
            continue
        for member in group.members:
            router = tensors[member.name]
            if router.ndim == 2:
                removed[id(router)] = torch.tensor(gone, device=router.device)
                numbers[id(router)] = group.num_units
    if not removed:
        yield
        return
    with _RoutedAround(removed, numbers):
        yield
