"""Conditional adapters: a frozen block computes for a few tokens of each sequence, a small adapter for all.

    y = x + adapter(x) + m (block(x_chosen) - x_chosen)

with m the relaxed choice of the k tokens and zero elsewhere. The chosen tokens attend to each other alone ("k to k" of
the paper). Only adapters, routers and the gains of norms learn. At first every token is chosen with m = 1 and the
adapters give next to nothing, so that the model computes what it did.

Source: Lei et al., Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference, arXiv 2304.04947.
    Ours: the router and the adapter read inputs of unit root mean square; the choice narrows over a ramp instead of a
    phase of pretraining; the choice itself is exact, not iterated; in decoders tokens are judged alone (token_router).
Defaults: reduction 3 for text is the paper's; epsilon 0.3 lies between its 0.03 for text, at which nearly all chosen
    entries are 1 and teach the router nothing, and its 1.0 for speech.
Cost: two matrices of the adapter for each token; the block for one token in `reduction`.
Limits: blocks that take an attention mask, with eager or sdpa attention; decoding with a cache that grows.

Shapes: B sequences, T tokens, D features, A features of the adapter, N chosen tokens.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base.bounds import at_least
from lightning_prune.conditional.block_calls import (
    STATES,
    Block,
    Padding,
    Replaced,
    blocks_with_calls,
    inserting,
    is_causal,
    noting,
    register,
)
from lightning_prune.conditional.chosen_tokens import OnChosen, check_on_chosen
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.conditional.token_router import NEXT_TO_NOTHING, RoutedTokens, TokenRouter, check_share
from lightning_prune.structured.structure import Stack
from lightning_prune.targets import layers as kinds

__all__ = ["Adapter", "ConditionalAdapter"]

_IMPLEMENTATIONS = ("eager", "sdpa")


class Adapter(nn.Module):
    """Two matrices with a nonlinearity between them; gives next to nothing at first.

    Args:
        width: D.
        inner: A.
        like: a weight whose device and dtype it takes.
        seed: of both.
    """

    def __init__(self, width: int, inner: int, *, like: Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Linear(width, inner, bias=False, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(inner, width, bias=False, device=like.device, dtype=like.dtype)
        drawn_AD = torch.randn(inner, width, generator=generator) / width**0.5
        with torch.no_grad():
            self.down.weight.copy_(drawn_AD)
            self.up.weight.copy_(NEXT_TO_NOTHING * torch.randn(width, inner, generator=generator))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the update of every token, shaped as they are."""
        hidden = self.down(functional.rms_norm(x_BTD, (x_BTD.shape[-1],)))
        update: Tensor = self.up(functional.gelu(hidden))
        return update


@dataclass(frozen=True, kw_only=True)
class ConditionalAdapter(ConditionMethod):
    """Method for tuning a model while it becomes faster; see the module text.

    Args:
        reduction: one token in so many passes through the frozen block.
        adapter_width: A.
        epsilon: temperature of the choice, in units of the scores.
        ramp: share of the training over which the choice narrows.
        layers: the blocks that change; all if it is not given.
        seed: of routers and adapters.
        rate: see `ConditionMethod`.
    """

    reduction: float = 3.0
    adapter_width: int = 64
    epsilon: float = 0.3
    ramp: float = 0.25
    layers: tuple[int, ...] | None = None
    seed: int = 0
    rate: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, reduction=self.reduction, adapter_width=self.adapter_width)
        check_share(epsilon=self.epsilon, ramp=self.ramp)

    def insert(self, model: nn.Module, stack: Stack) -> RoutedTokens:
        """Freeze a model and insert routers and adapters; see `ConditionMethod`."""
        name = getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager"
        if name not in _IMPLEMENTATIONS:
            raise ValueError(
                f"conditional adapters need attn_implementation {' or '.join(_IMPLEMENTATIONS)}, got {name!r}: the "
                "masks of others do not tell which tokens may attend to which"
            )
        blocks = blocks_with_calls(model, stack, self.layers)
        runs = {}
        for block in blocks:
            if any(block.call.kwargs.get(name) is not None for name in STATES):
                raise ValueError(
                    f"{block.name} reads an encoder, whose keys its cache holds as well; insert conditional adapters "
                    "into the encoder"
                )
            causal = is_causal(block.call, block.module.forward)
            runs[block.layer] = OnChosen(block.module, is_causal=causal)
            check_on_chosen(runs[block.layer], block.call, block.name)
        with inserting(model) as undo:
            known = noting(blocks, undo)
            routers: list[TokenRouter] = []
            added: dict[str, nn.Module] = {}
            for block in blocks:
                router, adapter = self._made(block, is_causal=runs[block.layer].is_causal)
                register(block.module, "token_router", router, undo)
                register(block.module, "adapter", adapter, undo)
                _Through(block.module, runs[block.layer], known).put(undo)
                routers.append(router)
                added |= {f"{block.name}.token_router": router, f"{block.name}.adapter": adapter}
            _freeze(model, added, undo)
        return RoutedTokens(routers, added, undo, ramp=self.ramp)

    def _made(self, block: Block, *, is_causal: bool) -> tuple[TokenRouter, Adapter]:
        like = next(parameter for parameter in block.module.parameters() if parameter.is_floating_point())
        width, seed = block.call.read.shape[-1], self.seed + 7919 * block.layer
        share = 1 / self.reduction
        router = TokenRouter(width, share=share, is_causal=is_causal, like=like, epsilon=self.epsilon, seed=seed)
        return router, Adapter(width, self.adapter_width, like=like, seed=seed + 1)


class _Through(Replaced):
    """A block that some tokens pass through and the others by."""

    def __init__(self, module: nn.Module, run: OnChosen, known: Padding) -> None:
        super().__init__(module)
        self.run, self.known = run, known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns, with the hidden states of all tokens."""
        block: Any = self.module
        x_BTD = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3)
        chosen_BT, scale_BT = block.token_router(x_BTD, self.known.keep(x_BTD))
        given_ND, places, output = self.run(args, kwargs, chosen_BT)
        x_ND = x_BTD.flatten(0, 1)[places.flat_N]
        update_ND = scale_BT.flatten()[places.flat_N, None] * (given_ND - x_ND)
        y_BTD = x_BTD + block.adapter(x_BTD)
        y_BTD = y_BTD.flatten(0, 1).index_add(0, places.flat_N, update_ND.to(y_BTD.dtype)).view_as(x_BTD)
        return (y_BTD, *output[1:]) if isinstance(output, tuple) else y_BTD


def _freeze(model: nn.Module, added: dict[str, nn.Module], undo: ExitStack) -> None:
    """Let only what was added and norms learn."""
    learning = {id(parameter) for module in added.values() for parameter in module.parameters()}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        is_norm = not kinds.is_layer(module) and all(parameter.ndim == 1 for parameter in own)
        if own and is_norm and next(module.children(), None) is None:
            learning |= {id(parameter) for parameter in own}
    for parameter in model.parameters():
        if id(parameter) not in learning:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
