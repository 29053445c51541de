"""Refit the kept weights of every row to what the whole row computed, each row with a support of its own.

What `least_squares` does for whole columns, for any mask: unstructured, N:M, blocks. Every row is a system of its own,
(G_KK + ridge) d_K = G_KP w_P with the kept inputs K and the pruned ones P of that row; all are solved at once by
conjugate gradients, whose only large operation is one product with the Gram matrix per step.

Source: the normal equations of min |x w'^T - x w^T|^2 over weights with a given support, as in Frantar and Alistarh,
    SparseGPT, arXiv 2301.00774, section 3.1, which calls it exact reconstruction and goes on to an approximation of
    it; Hestenes and Stiefel, 1952, for the conjugate gradients, here scaled by the diagonal. Differences: the damping
    holds back the change of the kept weights, as in `least_squares`; nothing is factorised, so rows need not share a
    support.
    Bias: An et al., FLAP, arXiv 2312.11983, for single weights: b' = b + (W - W') mean(x).
Cost: per step 2 O I^2 operations and a few passes over five O x I matrices; 24 to 90 steps at damping 1e-4 and above,
    measured on models of 0.3 and 3 million parameters.
Limits: needs tokens, as `least_squares` does.

Shapes: O output features, I input features, J = I + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Refit", "bias_change", "centred", "damping_for", "masked_least_squares"]

_STEPS_PER_CHECK = 8  # asking for the residual makes the accelerator wait


@dataclass(frozen=True)
class Refit:
    """Refitted weights, +0.0 outside the mask, and how the solution was reached.

    `residual` is the largest residual of a row relative to the row's right side.
    """

    weight_OI: Tensor
    num_steps: int
    residual: float


def damping_for(tokens_per_input: float) -> float:
    """Return the damping for so many calibration tokens per kept input: 3 over their number, 0.03 at least.

    Our measurement on a 0.3-million-parameter model that loses half of its weights by Wanda (perplexity 21.3 without a
    refit). Best of 3, 1, 0.3, 0.1, 0.03, 0.01 and 0.001 at 2 tokens per kept input: 1, with 16.2, where 0.01 gives
    34.0; at 4 and 8: 0.3, with 14.8 and 14.3; at 32 and 95: 0.1, with 14.2 and 13.9, and little worse below it. With
    3 million parameters and 40 tokens or more: 0.1 or 0.03. Where weights go 2:4 the best are the same.
    """
    return max(3 / tokens_per_input, 0.03)


def masked_least_squares(
    weight_OI: Tensor,
    mask_OI: Tensor,
    gram_II: Tensor,
    damping: float,
    *,
    wanted_II: Tensor | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
) -> Refit:
    """Return the weights on the mask that give the output of all weights best, on the same inputs or on others.

    Args:
        weight_OI: the weights before pruning, in any float dtype.
        mask_OI: bool, True = keep.
        gram_II: sum of products of the inputs over the calibration tokens, divided by their number or not. Its dtype,
            float32 or float64, is that of the arithmetic and of the answer.
        damping: >= 0, in units of the mean of the Gram matrix's diagonal.
        wanted_II: sum of products of the inputs on which the dense weights give the wanted output (rows) with those
            that the kept weights will see (columns). Default: they are the same, and this is `gram_II`.
        tolerance: relative residual at which a row is done. The output error is flat around its minimum, so it is
            exact to twice as many digits.
        max_steps: after which the answer is given as it is, with its residual.

    Raises:
        ValueError: if shapes or dtypes disagree, the damping is negative, or the Gram matrix holds NaN or infinity.
    """
    _check(weight_OI, mask_OI, gram_II, damping)
    weight_OI = weight_OI.to(gram_II.dtype)
    diagonal_I = gram_II.diagonal()
    ridge = damping * diagonal_I.mean()
    inverse_I = 1 / (diagonal_I + ridge).clamp(min=torch.finfo(gram_II.dtype).tiny)

    def apply(matrix_OI: Tensor) -> Tensor:
        return torch.addmm(matrix_OI * ridge, matrix_OI, gram_II).mul_(mask_OI)

    right_OI = weight_OI.masked_fill(mask_OI, 0) @ gram_II
    if wanted_II is not None:
        right_OI += weight_OI @ (wanted_II - gram_II)
    right_OI.mul_(mask_OI)
    change_OI, num_steps, residual = _conjugate_gradients(apply, right_OI, inverse_I, tolerance, max_steps)
    return Refit((weight_OI + change_OI).masked_fill_(~mask_OI, 0), num_steps, residual)


def centred(product_JJ: Tensor) -> Tensor:
    """Return the sum of products of inputs less their means; refitting with it leaves the means to the bias.

    Args:
        product_JJ: sum of products of inputs, of one kind or of two, with a constant 1 appended.
    """
    return product_JJ[:-1, :-1] - torch.outer(product_JJ[:-1, -1], product_JJ[-1, :-1] / product_JJ[-1, -1])


def bias_change(weight_OI: Tensor, pruned_OI: Tensor, wanted_JJ: Tensor) -> Tensor:
    """Return change_O: what the bias must take up so that the mean of the output is the wanted one.

    Args:
        weight_OI: the weights before pruning.
        pruned_OI: those that take their place.
        wanted_JJ: products of the inputs that give the wanted output (rows) with those that there are (columns),
            a constant 1 appended to both; the Gram matrix of the statistic `gram` where they are the same.
    """
    wanted_I, mean_I = wanted_JJ[:-1, -1] / wanted_JJ[-1, -1], wanted_JJ[-1, :-1] / wanted_JJ[-1, -1]
    return weight_OI.to(mean_I.dtype) @ wanted_I - pruned_OI.to(mean_I.dtype) @ mean_I


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right_OI: Tensor, inverse_I: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, int, float]:
    """Solve apply(x) = right for all rows side by side, scaled by `inverse_I`; return x, steps and residual."""
    solution_OI = torch.zeros_like(right_OI)
    residual_OI = right_OI.clone()
    scaled_OI = residual_OI * inverse_I
    direction_OI = scaled_OI.clone()
    product_O = (residual_OI * scaled_OI).sum(1)
    norm_O = right_OI.norm(dim=1).clamp(min=torch.finfo(right_OI.dtype).tiny)
    for step in range(max_steps):
        if step % _STEPS_PER_CHECK == 0:
            worst = float((residual_OI.norm(dim=1) / norm_O).max())
            if worst <= tolerance:
                return solution_OI, step, worst
        applied_OI = apply(direction_OI)
        curvature_O = (direction_OI * applied_OI).sum(1)
        length_O = torch.where(curvature_O > 0, product_O / curvature_O, 0)  # 0 where a row is solved exactly
        solution_OI.addcmul_(direction_OI, length_O[:, None])
        residual_OI.addcmul_(applied_OI, length_O[:, None], value=-1)
        torch.mul(residual_OI, inverse_I, out=scaled_OI)
        before_O, product_O = product_O, (residual_OI * scaled_OI).sum(1)
        direction_OI.mul_(torch.where(before_O > 0, product_O / before_O, 0)[:, None]).add_(scaled_OI)
    return solution_OI, max_steps, float((residual_OI.norm(dim=1) / norm_O).max())


def _check(weight_OI: Tensor, mask_OI: Tensor, gram_II: Tensor, damping: float) -> None:
    num_inputs = weight_OI.shape[1]
    if gram_II.shape != (num_inputs, num_inputs):
        raise ValueError(
            f"weight has {num_inputs} input features, the Gram matrix is {' x '.join(map(str, gram_II.shape))}; "
            "collect it from the layer that owns the weight"
        )
    if mask_OI.shape != weight_OI.shape or mask_OI.dtype != torch.bool:
        raise ValueError(
            f"the mask must be bool and shaped like the weight, {tuple(weight_OI.shape)}, got {mask_OI.dtype} and "
            f"{tuple(mask_OI.shape)}"
        )
    if gram_II.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the Gram matrix must be float32 or float64, got {gram_II.dtype}; a coarser one is useless")
    if damping < 0:
        raise ValueError(f"damping must be >= 0, got {damping}; 1e-2 is usual")
    if not bool(torch.isfinite(gram_II).all()):
        raise ValueError("the Gram matrix holds NaN or infinity; check the model and the calibration batches")
