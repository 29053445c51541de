"""Put a routed feed-forward part in the place of that of each block.

Shapes: B sequences, T tokens, D features, N rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.conditional.block_calls import (
    Block,
    Padding,
    Replaced,
    blocks_with_calls,
    ffn_chain,
    is_causal,
)
from lightning_prune.structured.depth.bypass import first_tensor
from lightning_prune.structured.discovery.discover import discover
from lightning_prune.structured.groups import Group
from lightning_prune.structured.structure import Stack, Structure

__all__ = ["Chain", "Part", "RoutedFFN", "add_rows", "ffn_parts"]


class Chain:
    """Modules called one after another, as they were before anything stood in their place."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.forwards: tuple[Callable[..., Any], ...] = tuple(module.forward for module in modules)

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the last one gives, shaped as the input."""
        for forward in self.forwards:
            x = first_tensor(forward(x))
        return x

    def rows(self, x_ND: Tensor) -> Tensor:
        """Return what they give for tokens without their sequences."""
        return self(x_ND[None])[0]


@dataclass(frozen=True)
class Part:
    """The feed-forward part of one block: its units, the modules that compute with them, and how it is used."""

    block: Block
    group: Group
    modules: tuple[nn.Module, ...]
    is_causal: bool

    @property
    def first(self) -> nn.Module:
        """Return the module that reads the part's input, inside which a router stands."""
        return self.modules[0]

    @property
    def like(self) -> Tensor:
        """Return a weight of the part."""
        return next(parameter for parameter in self.first.parameters() if parameter.is_floating_point())


def ffn_parts(
    model: nn.Module, stack: Stack, layers: Sequence[int] | None
) -> tuple[list[Part], Structure, dict[int, str]]:
    """Find the feed-forward parts of blocks, what else is cut with their units, and the names of modules by identity.

    Raises:
        ValueError: if a block has none that can be called on some tokens.
    """
    blocks = blocks_with_calls(model, stack, layers)
    structure = discover(model, kinds=["ffn"])
    names = {id(module): name for name, module in model.named_modules()}
    parts = []
    for block in blocks:
        group, modules = ffn_chain(block, structure, names)
        parts.append(Part(block, group, modules, is_causal(block.call, block.module.forward)))
    return parts, structure, names


class RoutedFFN(Replaced, ABC):
    """What stands in the place of a feed-forward part; the subclass says what it computes.

    Args:
        part: its modules; the first computes the whole from now on, the others pass on what they get.
        known: padding of the blocks.
        undo: what ends it.
    """

    def __init__(self, part: Part, known: Padding, undo: ExitStack) -> None:
        super().__init__(part.first)
        self.dense, self.known = Chain(part.modules), known
        for module in part.modules[1:]:
            Replaced(module).put(undo)
        self.put(undo)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the part for all tokens, with their sequences."""
        (x,) = (*args, *kwargs.values())
        x_BTD = self.known.tokens(x)
        return self.compute(x_BTD, self.known.keep(x_BTD)).reshape(x.shape)

    @abstractmethod
    def compute(self, x_BTD: Tensor, keep_BT: Tensor | None) -> Tensor:
        """Return the part's output of every token."""


def add_rows(
    y_BTD: Tensor, x_BTD: Tensor, chosen_BT: Tensor, scale_BT: Tensor, compute: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return y plus scale times what is computed of the chosen tokens of x; for the others nothing is computed.

    Args:
        y_BTD: what it is added to.
        x_BTD: what the chosen are taken from.
        chosen_BT: bool.
        scale_BT: factors of the chosen.
        compute: from (N, D) to (N, D); called without rows only while gradients are taken, so that all processes reduce
            the same ones.
    """
    chosen_N = chosen_BT.flatten().nonzero()[:, 0]
    if len(chosen_N) == 0 and not torch.is_grad_enabled():
        return y_BTD
    rows_ND = compute(x_BTD.flatten(0, 1)[chosen_N])
    rows_ND = scale_BT.flatten()[chosen_N, None] * rows_ND
    return y_BTD.flatten(0, 1).index_add(0, chosen_N, rows_ND.to(y_BTD.dtype)).view_as(y_BTD)
