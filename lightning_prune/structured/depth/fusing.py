"""Spread the weights of one block over others: the fused weight, its trainable factors and their training.

Each linear layer W of a neighbour becomes W + B A + (C D) * W_b, where W_b is the layer of the same role in the block
that goes, B A a low-rank update and C D low-rank coefficients, entry by entry. B and C start at zero, so that at first
the neighbours are what they were. Afterwards the sums are plain weights again.

Source: FuseGPT, arXiv 2411.14507 (JarvisPei/FuseGPT). Differences: the hidden states are compared by their squared
    error; the divergence is over the hidden dimension, the released code takes dimension 0.
Cost: 2 R (O + I) float32 factors and Adam's two moments of them per linear layer; a step holds one fused copy of every
    linear layer of the group, and its gradient.
Limits: linear layers of equal shapes in all blocks.

Shapes: O output features, I input features, R rank, N tokens that are not padding, D width of the residual stream.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lightning_prune.structured.depth.alike import linear_roles, weight_of

__all__ = [
    "Factors",
    "FusedBlock",
    "HiddenDivergence",
    "HiddenLoss",
    "HiddenSquaredError",
    "fused_weight",
]


class HiddenLoss(ABC):
    """How far the hidden states are from those of the dense blocks."""

    @abstractmethod
    def loss(self, fused_ND: Tensor, dense_ND: Tensor) -> Tensor:
        """Return one number to minimise, in float32."""


@dataclass(frozen=True)
class HiddenSquaredError(HiddenLoss):
    """The mean squared error."""

    def loss(self, fused_ND: Tensor, dense_ND: Tensor) -> Tensor:
        """Return the mean over tokens and features."""
        return functional.mse_loss(fused_ND.float(), dense_ND.float())


@dataclass(frozen=True)
class HiddenDivergence(HiddenLoss):
    """The divergence of softmax over the hidden dimension, that of the dense states first, as in the paper.

    It is blind to a constant that is added to all features of a token.
    """

    def loss(self, fused_ND: Tensor, dense_ND: Tensor) -> Tensor:
        """Return the mean over tokens."""
        log_dense_ND = dense_ND.float().log_softmax(-1)
        log_fused_ND = fused_ND.float().log_softmax(-1)
        return functional.kl_div(log_fused_ND, log_dense_ND, reduction="batchmean", log_target=True)


def fused_weight(
    weight_OI: Tensor, removed_OI: Tensor, low_rank: tuple[Tensor, Tensor], coefficients: tuple[Tensor, Tensor]
) -> Tensor:
    """Return W + B A + (C D) * W_b in float32.

    Args:
        weight_OI: the neighbour's.
        removed_OI: of the same layer in the block that goes.
        low_rank: B (O, R) and A (R, I).
        coefficients: C (O, R) and D (R, I).
    """
    b_OR, a_RI = low_rank
    c_OR, d_RI = coefficients
    return weight_OI.float() + b_OR @ a_RI + (c_OR @ d_RI) * removed_OI.float()


class Factors(nn.Module):
    """The factors of one linear layer; B and C are zero, A and D uniform within 1 / sqrt(I), as LoRA's A is."""

    def __init__(self, weight_OI: Tensor, rank: int, *, seed: str) -> None:
        super().__init__()
        num_out, num_in = weight_OI.shape
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        device = weight_OI.device

        def uniform() -> nn.Parameter:
            drawn = torch.rand(rank, num_in, generator=generator).mul_(2).sub_(1).div_(math.sqrt(num_in))
            return nn.Parameter(drawn.to(device))

        self.a_RI, self.d_RI = uniform(), uniform()
        self.b_OR = nn.Parameter(torch.zeros(num_out, rank, device=device))
        self.c_OR = nn.Parameter(torch.zeros(num_out, rank, device=device))

    def forward(self, weight_OI: Tensor, removed_OI: Tensor) -> Tensor:
        """Return the fused weight in the dtype of the weight."""
        fused_OI = fused_weight(weight_OI, removed_OI, (self.b_OR, self.a_RI), (self.c_OR, self.d_RI))
        return fused_OI.to(weight_OI.dtype)


class FusedBlock:
    """A block with factors beside its linear layers, and its norms to be trained; the block itself is not changed.

    Args:
        block: the neighbour.
        removed: the block that goes.
        rank: of both pairs of factors.
        seed: names the draw of the factors.
    """

    def __init__(self, block: nn.Module, removed: nn.Module, rank: int, *, seed: str) -> None:
        self.block = block
        self.layers = linear_roles(block)
        self.removed = linear_roles(removed)
        self.factors = {
            name: Factors(weight_of(module).detach(), rank, seed=f"{seed}/{name}")
            for name, module in self.layers.items()
        }
        self.norms = {name: nn.Parameter(value.detach().float().clone()) for name, value in _norms(block).items()}

    @property
    def slow(self) -> list[nn.Parameter]:
        """Return what is trained with the smaller learning rate: the low-rank update and the norms."""
        return [p for item in self.factors.values() for p in (item.a_RI, item.b_OR)] + list(self.norms.values())

    @property
    def fast(self) -> list[nn.Parameter]:
        """Return what is trained with the larger learning rate: the coefficients."""
        return [p for item in self.factors.values() for p in (item.c_OR, item.d_RI)]

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of the block that the factors change, by name."""
        own = dict(self.block.named_parameters())
        result = {name: value.to(own[name].dtype) for name, value in self.norms.items()}
        for name, factors in self.factors.items():
            layer = self.layers[name]
            fused_OI = factors(weight_of(layer).detach(), weight_of(self.removed[name]).detach())
            result[f"{name}.weight"] = fused_OI if isinstance(layer, nn.Linear) else fused_OI.T
        return result

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the block with its fused weights."""
        return functional_call(self.block, self.tensors(), args, kwargs)

    @property
    def written(self) -> list[Tensor]:
        """Return the parameters of the block that `merge_` writes."""
        own = dict(self.block.named_parameters())
        return [own[name] for name in (*self.norms, *(f"{name}.weight" for name in self.factors))]

    @torch.no_grad()
    def merge_(self) -> None:
        """Write the fused weights into the block."""
        own: Mapping[str, Tensor] = dict(self.block.named_parameters())
        for name, value in self.tensors().items():
            own[name].copy_(value)


def _norms(block: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of modules that hold vectors only: scales and shifts of norms."""
    found: dict[str, Tensor] = {}
    for prefix, module in block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and all(value.ndim == 1 for value in own.values()):
            found |= {f"{prefix}.{leaf}" if prefix else leaf: value for leaf, value in own.items()}
    return found
