"""Low-rank updates of a sparse weight that keep every zero a zero.

`masked` adds a low-rank product inside the mask, W + s (M * BA); `scaled` multiplies the weight by one, W * BA. Both
merge into a weight with the zeros of W, and the merged layer computes what the unmerged one does.

The linear layer is one autograd function: it multiplies by the finished weight, so that base and update cost one
matrix product together, and builds that weight again in the backward pass instead of keeping it.

Source: Zimmer et al., PERP, arXiv 2312.15230, MaskLoRA and ScaleLoRA. The start of `scaled` differs: with all entries
    1 / sqrt(r), as published, all r rows get the same gradient for ever and the product stays of rank one; here one
    row of A and one column of B are one, the rest starts like a LoRA (A random, B zero), and BA = 1 holds exactly.
Cost: against a plain LoRA one more matrix product of the size of the layer's weight gradient in the backward pass, and
    a weight-sized temporary tensor in each pass; nothing weight-sized is kept between them.

Shapes: O output features, I input features, R rank; ... any leading dimensions.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["LowRankForm", "effective_weight", "low_rank_linear", "start_low_rank"]

LowRankForm = Literal["masked", "scaled"]


def effective_weight(
    weight_OI: Tensor | None, mask_OI: Tensor, down_RI: Tensor, up_OR: Tensor, *, form: LowRankForm, scale: float
) -> Tensor:
    """Return the weight that a layer with this update multiplies by.

    Args:
        weight_OI: the frozen weight; None for the update of `masked` alone, where the weight is multiplied elsewhere.
        mask_OI: bool, True = keep; of use to `masked` alone, since `scaled` keeps the zeros of the weight by itself.
        down_RI: the factor that reads the input, A.
        up_OR: the factor that writes the output, B.
        form: see the module text.
        scale: of the product, alpha / r; of no use to `scaled`.

    Returns:
        weight_OI, float32 (float64 for float64 factors): what was zero is +0.0.
    """
    if form == "scaled":
        assert weight_OI is not None
        return _product(down_RI, up_OR).mul_(weight_OI).add_(0.0)
    # Scaling the thin factor and multiplying by bytes in place of bools halves the passes over the whole weight.
    update_OI = _product(down_RI, up_OR, scale).mul_(mask_OI.view(torch.uint8))
    return update_OI if weight_OI is None else update_OI.add_(weight_OI)


def _product(down_RI: Tensor, up_OR: Tensor, scale: float = 1.0) -> Tensor:
    dtype = torch.promote_types(down_RI.dtype, torch.float32)
    return (up_OR.to(dtype) * scale) @ down_RI.to(dtype)


def low_rank_linear(
    input: Tensor,
    weight_OI: Tensor | None,
    mask_OI: Tensor,
    down_RI: Tensor,
    up_OR: Tensor,
    *,
    form: LowRankForm,
    scale: float,
) -> Tensor:
    """Multiply by the effective weight, without a bias.

    Args:
        input: (..., I); under autocast it is multiplied in autocast's dtype, else in its own.
        weight_OI: the weight; it gets a gradient only if it asks for one. None for the update alone.
        mask_OI: bool, True = keep.
        down_RI: A.
        up_OR: B.
        form: `masked` or `scaled`.
        scale: alpha / r.

    Returns:
        (..., O) in the dtype of the multiplication.
    """
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    with torch.autocast(device, enabled=False):
        output: Tensor = _LowRankLinear.apply(input.to(dtype), weight_OI, mask_OI, down_RI, up_OR, form, scale)
    return output


class _LowRankLinear(torch.autograd.Function):
    """See `low_rank_linear`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_OI: Tensor | None, mask_OI: Tensor, *update: Any) -> Tensor:
        """Multiply by the effective weight."""
        down_RI, up_OR, form, scale = update
        ctx.form, ctx.scale = form, scale
        ctx.save_for_backward(input, weight_OI, mask_OI, down_RI, up_OR)
        effective_OI = effective_weight(weight_OI, mask_OI, down_RI, up_OR, form=form, scale=scale)
        return input @ effective_OI.to(input.dtype).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight, mask, A, B, form and scale."""
        input, weight_OI, mask_OI, down_RI, up_OR = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        grad_input = None
        if needs_input:
            effective_OI = effective_weight(weight_OI, mask_OI, down_RI, up_OR, form=ctx.form, scale=ctx.scale)
            grad_input = grad @ effective_OI.to(grad.dtype)
        grad_OI = (grad.flatten(0, -2).T @ input.flatten(0, -2)).to(torch.promote_types(down_RI.dtype, torch.float32))
        grad_weight = None
        if needs_weight:
            grad_weight = (grad_OI * _product(down_RI, up_OR) if ctx.form == "scaled" else grad_OI).to(weight_OI.dtype)
        if ctx.form == "masked" and needs_weight:
            grad_OI = grad_OI.clone()
        grad_OI = grad_OI.mul_(weight_OI if ctx.form == "scaled" else mask_OI.view(torch.uint8))
        scale = 1.0 if ctx.form == "scaled" else ctx.scale
        grad_down = ((up_OR.to(grad_OI.dtype) * scale).T @ grad_OI).to(down_RI.dtype)
        grad_up = (grad_OI @ (down_RI.to(grad_OI.dtype) * scale).T).to(up_OR.dtype)
        return grad_input, grad_weight, None, grad_down, grad_up, None, None


@torch.no_grad()
def start_low_rank(down_RI: Tensor, up_OR: Tensor, *, form: LowRankForm) -> None:
    """Fill the factors in place so that the layer starts as the weight alone."""
    nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5))
    up_OR.zero_()
    if form == "scaled":
        down_RI[0].fill_(1.0)
        up_OR[:, 0].fill_(1.0)
