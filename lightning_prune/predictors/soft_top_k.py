"""Choose k of n scores so that a gradient reaches the scores.

The choice is the solution of: maximise s . l + epsilon * entropy(l) with 0 <= l <= 1 and sum(l) = k. With the entropy
-l ln l it is min(1, exp((s + a) / epsilon)), one number a per row, so it is found exactly from the sorted scores and
its gradient is a formula; nothing is iterated and nothing but the solution is kept for the backward pass.

Source: Lei et al., Conditional Adapters, arXiv 2304.04947, and Ainslie et al., CoLT5, arXiv 2303.09752, which iterate;
    the same problem with the binary entropy is a sigmoid with a threshold.
Cost: one sort of the scores in float32.
Limits: an entry at 1 gets no gradient; scores that are nearly constant give about k / n everywhere.

Shapes: ... any batch, N scores, K chosen.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.base.bounds import at_least

__all__ = ["SoftTopK", "kept", "soft_top_k", "soft_top_k_iterative"]

Form = Literal["entropic", "logistic"]
_BISECTIONS = 40  # halvings of an interval of scores: below the spacing of float32


def soft_top_k(scores_N: Tensor, k: int | Tensor, *, epsilon: float = 0.3, form: Form = "entropic") -> Tensor:
    """Return the relaxed choice of k scores in each row.

    Args:
        scores_N: (..., N) in any float dtype; -inf for what cannot be chosen. The arithmetic is float32 at least.
        k: how many, 1 to N; a whole number, or one per row, (...).
        epsilon: temperature; towards 0 the choice becomes the k largest.
        form: the entropy. `entropic` reaches 1 exactly; `logistic`, sigmoid((s - t) / epsilon), never does.

    Returns:
        (..., N) in [0, 1], each row with the sum k; float32, or float64 for scores in it.

    Raises:
        ValueError: if k is not in 1 to N, or epsilon is not positive.
    """
    _check(scores_N, k, epsilon)
    with torch.autocast(scores_N.device.type, enabled=False):
        precise_N = scores_N if scores_N.dtype == torch.float64 else scores_N.float()
        if form == "entropic":
            chosen_N: Tensor = _Entropic.apply(precise_N, k, epsilon)
        else:
            chosen_N = _Logistic.apply(precise_N, k, epsilon)
    return chosen_N


def soft_top_k_iterative(
    scores_N: Tensor,
    k: int,
    *,
    epsilon: float,
    num_iterations: int = 50,
    start: float | None = None,
    decay: float = 1.0,
) -> Tensor:
    """Return the relaxed choice as the papers compute it, by iterations that autograd follows; for comparison.

    Far from converged for small epsilon and long rows: sums of 0.77 k are usual there.

    Args:
        scores_N: (..., N); the arithmetic is float32 at least.
        k: how many.
        epsilon: the temperature at the end.
        num_iterations: 50 in CoLT5, 20 in CoDA.
        start: the temperature at first, epsilon if it is not given; 4.0 in CoDA.
        decay: what the temperature is multiplied by after each iteration; 0.7 in CoDA.

    Raises:
        ValueError: if k is not in 1 to N, or epsilon is not positive.
    """
    _check(scores_N, k, epsilon)
    with torch.autocast(scores_N.device.type, enabled=False):
        s_N = scores_N if scores_N.dtype == torch.float64 else scores_N.float()
        temperature, b_N = epsilon if start is None else start, -s_N
        for _ in range(num_iterations):
            last = temperature
            a = last * (math.log(k) - ((s_N + b_N) / last).logsumexp(-1, keepdim=True))
            b_N = -(s_N + a).clamp(min=0)
            temperature = max(decay * last, epsilon)
        chosen_N = ((s_N + a + b_N) / last).exp()
    return chosen_N.masked_fill(s_N == -torch.inf, 0)


def kept(scores_N: Tensor, k: int | Tensor) -> Tensor:
    """Return where the k largest of each row stand, ties by index, so that every process chooses the same.

    Returns:
        (..., N) of bool with k true entries in a row.
    """
    order_N = scores_N.argsort(dim=-1, descending=True, stable=True)
    is_first_N = torch.arange(scores_N.shape[-1], device=scores_N.device) < _per_row(k, scores_N)
    return torch.zeros_like(scores_N, dtype=torch.bool).scatter_(-1, order_N, is_first_N.expand_as(order_N))


@dataclass(frozen=True, kw_only=True)
class SoftTopK:
    """Turns scores into masks with exactly k entries that are not zero.

    Args:
        epsilon: temperature, in units of the scores.
        form: see `soft_top_k`.
        hard: whether the mask is 1 where it is not 0, with the gradient of the soft one (straight-through); soft masks
            learn better on a trained parent, hard ones from scratch.
    """

    epsilon: float = 0.3
    form: Form = "entropic"
    hard: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf):
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")

    def __call__(self, scores_N: Tensor, k: int | Tensor) -> Tensor:
        """Return the mask of each row, (..., N) in [0, 1], float32 at least."""
        soft_N = soft_top_k(scores_N, k, epsilon=self.epsilon, form=self.form)
        soft_N = soft_N * kept(scores_N.detach(), k)
        return (soft_N > 0).to(soft_N.dtype) + (soft_N - soft_N.detach()) if self.hard else soft_N


class _Entropic(torch.autograd.Function):
    """min(1, exp((s + a) / epsilon)) with the sum k, and its gradient."""

    @staticmethod
    def forward(ctx: Any, scores_N: Tensor, k: int | Tensor, epsilon: float) -> Tensor:
        largest = k if isinstance(k, int) else int(k.max())
        sorted_N = scores_N.sort(dim=-1, descending=True).values / epsilon
        rest = sorted_N[..., largest:].logsumexp(-1, keepdim=True)  # -inf where nothing is left
        backwards = torch.cat((rest, sorted_N[..., :largest].flip(-1)), dim=-1)
        suffix_K = backwards.logcumsumexp(-1)[..., 1:].flip(-1)
        num_left_K = _per_row(k, scores_N) - torch.arange(largest, device=scores_N.device)
        shift_K = num_left_K.clamp(min=1).to(scores_N.dtype).log() - suffix_K
        is_free_K = sorted_N[..., :largest] + shift_K <= 0  # always the last: its suffix holds it
        first = is_free_K.to(torch.int8).argmax(-1, keepdim=True)
        chosen_N = (scores_N / epsilon + shift_K.gather(-1, first)).exp().clamp(max=1)
        ctx.save_for_backward(chosen_N)
        ctx.epsilon = epsilon
        return chosen_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (chosen_N,) = ctx.saved_tensors
        return _through_the_sum(chosen_N * (chosen_N < 1), grad_N, ctx.epsilon), None, None


class _Logistic(torch.autograd.Function):
    """sigmoid((s - t) / epsilon) with the sum k, t by bisection, and its gradient."""

    @staticmethod
    def forward(ctx: Any, scores_N: Tensor, k: int | Tensor, epsilon: float) -> Tensor:
        scaled_N, wanted = scores_N / epsilon, _per_row(k, scores_N)
        finite_N = scaled_N.masked_fill(scaled_N == -torch.inf, torch.inf)
        margin = math.log(scores_N.shape[-1]) + 20.0  # beyond it all sigmoids together miss less than one
        low, high = finite_N.amin(-1, keepdim=True) - margin, scaled_N.amax(-1, keepdim=True) + margin
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_too_many = (scaled_N - middle).sigmoid().sum(-1, keepdim=True) > wanted
            low, high = torch.where(is_too_many, middle, low), torch.where(is_too_many, high, middle)
        chosen_N = (scaled_N - (low + high) / 2).sigmoid()
        ctx.save_for_backward(chosen_N)
        ctx.epsilon = epsilon
        return chosen_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (chosen_N,) = ctx.saved_tensors
        return _through_the_sum(chosen_N * (1 - chosen_N), grad_N, ctx.epsilon), None, None


def _through_the_sum(slope_N: Tensor, grad_N: Tensor, epsilon: float) -> Tensor:
    """Return the gradient of the scores: what each entry would get, less what the fixed sum takes back."""
    total = slope_N.sum(-1, keepdim=True).clamp(min=torch.finfo(slope_N.dtype).tiny)
    mean = (slope_N * grad_N).sum(-1, keepdim=True) / total
    return slope_N * (grad_N - mean) / epsilon


def _per_row(k: int | Tensor, scores_N: Tensor) -> Tensor:
    """Return k with one trailing dimension, to compare with entries of a row."""
    return torch.as_tensor(k, device=scores_N.device).unsqueeze(-1)


def _check(scores_N: Tensor, k: int | Tensor, epsilon: float) -> None:
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}; for the hard choice use kept(scores, k)")
    num = scores_N.shape[-1]
    if isinstance(k, int):
        at_least(1, k=k)
        if k > num:
            raise ValueError(f"k must be at most the {num} scores of a row, got {k}")
    elif int(k.min()) < 1 or int(k.max()) > num:
        raise ValueError(f"k must be in 1 to {num} in every row, got {k.min().item()} to {k.max().item()}")
