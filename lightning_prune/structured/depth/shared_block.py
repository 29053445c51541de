"""A block that computes with the matrices of another one, and low-rank differences of its own.

Every linear layer of the block becomes W + B A, where W is the weight of the same layer in the donor block: the very
same tensor, which is trained, moved and saved once, with the donor. Norms and biases stay the block's own. What the
block adds to the residual stream is scaled and shifted per feature, to have the mean and spread it is meant to have.

The donor is held outside of the module tree, so it appears once among the parameters, in `state_dict` and on disk.

Source: FlexiGPT, arXiv 2501.14713; the formulas are ours, from its description.
Cost: R (O + I) numbers per linear layer and 2 D per block are stored; computing takes as long as with full matrices.
Limits: where parameters are gathered block by block (FSDP), the donor's are not there when the other block runs.

Shapes: B sequences, T positions, D width of the residual stream, O outputs, I inputs, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SharedLinear", "UpdateNorm", "share_block"]


class SharedLinear(nn.Module):
    """A linear layer with the donor's weight plus B A, and a bias of its own.

    Args:
        donor: a layer with `weight`, inputs last (nn.Linear) or first (Conv1D).
        rank: of the difference; the smaller dimension of the weight at most.
        bias: the bias, or None.
    """

    def __init__(self, donor: nn.Module, rank: int, *, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.donor = (donor,)  # in a tuple, so that it is no part of this module
        weight_OI = self.shared_OI.detach()
        rank = min(rank, *weight_OI.shape)
        self.factor_b = nn.Parameter(weight_OI.new_zeros(weight_OI.shape[0], rank))
        self.factor_a = nn.Parameter(weight_OI.new_empty(rank, weight_OI.shape[1]).normal_(std=rank**-0.5))
        self.bias = bias

    @property
    def shared_OI(self) -> Tensor:
        """Return the donor's weight, output features first."""
        (donor,) = self.donor
        weight: Any = donor.weight
        return weight if isinstance(donor, nn.Linear) else weight.T

    @property
    def weight(self) -> Tensor:
        """Return what the layer multiplies by, in the orientation of the donor's weight; computed anew each time."""
        weight_OI = self.shared_OI + self.factor_b @ self.factor_a
        return weight_OI if isinstance(self.donor[0], nn.Linear) else weight_OI.T

    def forward(self, input_BTI: Tensor) -> Tensor:
        """Return the product, never forming the sum of the matrices."""
        output_BTO = functional.linear(input_BTI, self.shared_OI, self.bias)
        return output_BTO + functional.linear(functional.linear(input_BTI, self.factor_a), self.factor_b)

    def extra_repr(self) -> str:
        """Return the rank."""
        return f"rank={len(self.factor_a)}"


class UpdateNorm(nn.Module):
    """Scale and shift what a block adds to the residual stream, per feature; neutral at first."""

    def __init__(self, like_D: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones_like(like_D))
        self.shift = nn.Parameter(torch.zeros_like(like_D))

    def forward(self, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """Return the stream after the block."""
        return before_BTD + self.scale * (after_BTD - before_BTD) + self.shift


def _normalise_update(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    after = output[0] if isinstance(output, tuple | list) else output
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    before = next(value for value in values if value.shape == after.shape and value.is_floating_point())
    stream = block.update_norm(before, after)
    return type(output)((stream, *output[1:])) if isinstance(output, tuple | list) else stream


def share_block(block: nn.Module, donor: nn.Module, rank: int, *, width: int, names: Sequence[str]) -> None:
    """Let a block compute with the linear layers of another one, in place.

    Args:
        block: loses its own matrices.
        donor: a block of the same shapes that keeps its own.
        rank: of the differences.
        width: of the residual stream.
        names: of the linear layers, seen from the block.
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = block.get_submodule(parent)
        layer: Any = getattr(owner, leaf)
        shared = SharedLinear(donor.get_submodule(name), rank, bias=getattr(layer, "bias", None))
        setattr(owner, leaf, shared.train(layer.training))
    like_D = next(block.parameters()).detach().new_empty(width)
    block.update_norm = UpdateNorm(like_D).train(block.training)
    block.register_forward_hook(_normalise_update, with_kwargs=True)
