"""Simulate the removal of experts: their routers give them no share, so that no token is sent to them.

Setting weights to zero does not do that: a router row of zeros is a logit of zero, which may well win. What a router
computes is therefore changed as it is computed, and once more where a correction bias is added to it.

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


_ADDING = ("add", "add_", "__add__", "__radd__", "__iadd__")


class _RoutedAround(TorchFunctionMode):
    """Sets the logits of removed experts to minus infinity wherever a router's weight is multiplied or a bias added.

    Args:
        removed: id of a router's weight or of a vector with one entry per expert -> the experts that are gone.
        num_experts: the same id -> how many there are.
    """

    def __init__(self, removed: Mapping[int, Tensor], num_experts: Mapping[int, int]) -> None:
        super().__init__()
        self.removed, self.num_experts = dict(removed), dict(num_experts)
        self.held: list[Tensor] = []  # so that no id is used twice

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute, and mask what comes out of a router."""
        output = func(*args, **(kwargs or {}))
        if not isinstance(output, Tensor) or not args:
            return output
        own = [id(value) for value in args[:2] if isinstance(value, Tensor) and id(value) in self.removed]
        if not own:
            return output
        is_logits = output.shape[-1:] == (self.num_experts[own[0]],)
        is_product = func is torch.nn.functional.linear and id(args[1]) in own
        if is_logits and (is_product or getattr(func, "__name__", "") in _ADDING):
            return output.index_fill(-1, self.removed[own[0]], -torch.inf)
        if id(args[0]) in own and output.numel() == args[0].numel():  # a cast or a view of the same
            self.removed[id(output)], self.num_experts[id(output)] = self.removed[own[0]], self.num_experts[own[0]]
            self.held.append(output)
        return output


@contextmanager
def routed_around(model: nn.Module, groups: Mapping[str, Group], cuts: Sequence[Cut]) -> Iterator[None]:
    """Let no token reach the removed experts, whatever bias their routers add, until the block ends."""
    tensors = model.state_dict(keep_vars=True)
    removed: dict[int, Tensor] = {}
    numbers: dict[int, int] = {}
    for cut in cuts:
        group = groups[cut.group]
        gone = sorted(set(range(group.num_units)) - set(cut.keep))
        if group.kind != "experts" or not gone:
            continue
        for member in group.members:
            tensor = tensors[member.name]
            if tensor.ndim <= 2:
                removed[id(tensor)] = torch.tensor(gone, device=tensor.device)
                numbers[id(tensor)] = group.num_units
    if not removed:
        yield
        return
    with _RoutedAround(removed, numbers):
        yield
