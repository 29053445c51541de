"""Let every token skip blocks: a router in each block runs it for a token or passes the token on unchanged.

Trained with a share P of tokens that each block should run for, so that a deep model costs what a shallow one costs. In
training every block computes every token, and a straight-through gate with Gumbel noise mixes; otherwise the gate is
what the router prefers, and tokens that do not run are computed no further than their keys and values.

The router reads the stream of its own token in front of the block and nothing else, so it never looks ahead: a token
is decided the same way in a prompt, in a batch and alone. Keys and values are computed for all tokens, so that those
that run see those that skip.

Source: Zeng et al., Learning to Skip for Language Modeling, arXiv 2311.15436; the equations as a reproduction gives
    them. The offset of the logits at first and the ramp of P are ours, for models that are trained already.
Cost: 2 D numbers per block; training costs what it cost.
Limits: `sparse_block` says what is really left out. The share holds on what was trained on; `density` is logged. Under
    accumulation each batch is counted alone.

Shapes: B sequences, T tokens, D channels of the stream, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base.bounds import at_least
from lightning_prune.conditional.decoder_call import DecoderCall
from lightning_prune.conditional.method import Condition, ConditionMethod
from lightning_prune.conditional.sparse_block import SparseBlock, mixed
from lightning_prune.conditional.sparse_trial import make_sparse
from lightning_prune.conditional.stand_in import StandIn, sole_blocks, stream_width, with_hidden
from lightning_prune.structured.depth.bypass import first_tensor
from lightning_prune.structured.structure import Stack

__all__ = ["SkipLayer", "SkipLayerCondition", "SkipRouter", "density_loss", "straight_through"]


def straight_through(logits_BT2: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return gates (B, T): exactly 0 or 1, drawn with Gumbel noise, with the gradient of the softmax.

    Args:
        logits_BT2: to skip, to run; float32.
        temperature: of the softmax.
        generator: of the noise; torch's own by default, which a checkpoint replays.
    """
    uniform = torch.rand(logits_BT2.shape, dtype=torch.float32, device=logits_BT2.device, generator=generator)
    noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    share = functional.softmax((logits_BT2 + noise) / temperature, dim=-1)
    run = share[..., 1]
    return (run > share[..., 0]).to(run.dtype) + (run - run.detach())


def density_loss(densities_L: Tensor, density: float, strength: float) -> Tensor:
    """Return strength * sum over layers of (share of tokens that run - wanted share)^2."""
    return strength * (densities_L - density).square().sum()


@dataclass(frozen=True)
class SkipLayer(ConditionMethod):
    """Insert a router into every block.

    Args:
        density: share of tokens that a block runs for at the end, in (0, 1).
        strength: of the density loss.
        temperature: of the gate in training.
        offset: added to the logits to run before training; 2 lets 88 % of tokens run in training and all of them
            otherwise.
        ramp: share of the training in which the wanted density falls from 1 to `density` and the offset to 0; 0 for
            a model that is trained from scratch.
        rate: multiple of the learning rate for the routers.

    Raises:
        ValueError: if an option is out of range.
    """

    density: float = 0.5
    strength: float = 0.1
    temperature: float = 1.0
    offset: float = 2.0
    ramp: float = 0.25
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(f"density must lie between 0 and 1, got {self.density}; 0.5 runs half of the tokens")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be a share of the training, from 0 to 1, got {self.ramp}")
        at_least(0.0, strength=self.strength, offset=self.offset, rate=self.rate)
        at_least(1e-3, temperature=self.temperature)

    def insert(self, model: nn.Module, stack: Stack) -> "SkipLayerCondition":
        """Insert the routers; see `ConditionMethod`.

        Raises:
            ValueError: if the model has an encoder and a decoder, or its blocks are not one module each.
        """
        blocks = sole_blocks(model, stack, "skip_layer")
        width = stream_width(model, blocks, "skip_layer")
        call = DecoderCall(model, stack)
        routers = [SkipRouter(block, width, self, call) for block in blocks]
        for router in routers:
            router.install("skip_router")
        try:
            make_sparse(model, [router.sparse for router in routers])
        except BaseException:
            for router in routers:
                router.remove()
            call.remove()
            raise
        return SkipLayerCondition(self, stack.containers[0], routers, call)


class SkipRouter(StandIn):
    """Decides for every token whether a block runs: r = R x, no bias.

    Args:
        block: that it stands in.
        width: D.
        options: of the method.
        call: of the decoder, to know padding.
    """

    num_steps: Tensor
    progress: Tensor

    def __init__(self, block: nn.Module, width: int, options: SkipLayer, call: DecoderCall) -> None:
        super().__init__(block)
        self.options, self.call = options, call
        self.weight = nn.Parameter(self.like.new_zeros(2, width))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64, device=self.like.device))
        self.register_buffer("progress", torch.zeros((), device=self.like.device))  # along the ramp
        self.sparse = SparseBlock(self)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits to skip and to run, float32 (B, T, 2)."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            logits_BT2 = functional.linear(hidden_BTD.float(), self.weight.float())
        offset = self.options.offset * (1 - self.progress.float())
        return torch.stack([logits_BT2[..., 0], logits_BT2[..., 1] + offset], dim=-1)

    def run(self, *args: object, **kwargs: object) -> Any:
        """Run the block for the tokens that the router picks."""
        before_BTD: Tensor = next(iter(self.named(args, kwargs).values()))
        logits_BT2 = self.logits(before_BTD)
        if not self.training:
            return self.sparse(logits_BT2[..., 1] > logits_BT2[..., 0], args, kwargs)
        gate_BT = straight_through(logits_BT2, self.options.temperature)
        real_BT = self.call.real(before_BTD)
        density = gate_BT.mean() if real_BT is None else (gate_BT * real_BT).sum() / real_BT.sum().clamp(min=1)
        if not self.is_recomputed():
            self.call.noted[self] = density
        output = self.compute(*args, **kwargs)
        return with_hidden(output, mixed(gate_BT, before_BTD, first_tensor(output)))


class SkipLayerCondition(Condition):
    """The routers at work in one model.

    Args:
        options: of the method.
        container: name of the list of blocks.
        routers: one per block.
        call: of the decoder.
    """

    def __init__(self, options: SkipLayer, container: str, routers: Sequence[SkipRouter], call: DecoderCall) -> None:
        self.options, self.container, self.routers, self.call = options, container, list(routers), call
        self._num_steps, self._num_ramp = 0, 0.0
        self._progress = 0.0

    def added(self) -> Mapping[str, nn.Module]:
        """Return the routers by name."""
        return {f"{self.container}.{layer}.skip_router": router for layer, router in enumerate(self.routers)}

    def begin(self, *, total_steps: int) -> None:
        """Take in the length of the ramp, and how far the routers are."""
        self._num_steps, self._num_ramp = int(self.routers[0].num_steps), self.options.ramp * total_steps
        self._move()

    def after_step(self) -> None:
        """Move the ramp by one step."""
        self._num_steps += 1
        self._move()

    def _move(self) -> None:
        self._progress = min(1.0, self._num_steps / self._num_ramp) if self._num_ramp else 1.0
        for router in self.routers:
            router.num_steps.fill_(self._num_steps)
            router.progress.fill_(self._progress)

    def wanted(self) -> float:
        """Return the share of tokens that a block should run for now."""
        return 1 - (1 - self.options.density) * self._progress

    def _densities(self) -> Tensor | None:
        found = [self.call.noted[router] for router in self.routers if router in self.call.noted]
        return torch.stack(found) if found else None

    def loss(self) -> Tensor | None:
        """Return the density loss of the last training call."""
        densities_L = self._densities()
        return None if densities_L is None else density_loss(densities_L, self.wanted(), self.options.strength)

    def metrics(self) -> dict[str, float]:
        """Return the share of tokens that blocks ran for in the last training call: mean, lowest and highest."""
        densities_L = self._densities()
        if densities_L is None:
            return {}
        low, high = densities_L.detach().aminmax()
        mean = float(densities_L.detach().mean())
        return {"density": mean, "density_lowest": float(low), "density_highest": float(high), "wanted": self.wanted()}

    def remove(self) -> None:
        """Take the routers out."""
        for router in self.routers:
            router.remove()
        self.call.remove()
