"""The loss of a student's logits against a teacher's, summed over tokens, with its gradient computed on the way.

Rows of logits are read in chunks: beside the student's logits and one gradient of their size, only a chunk exists in
float32. The cross-entropy of the labels is computed along, since it costs one look-up.

Source: divergence and temperature, arXiv 2407.14679, section 3, and arXiv 1503.02531, section 2; the mixture with
    cross-entropy, arXiv 2407.20584, "Knowledge distillation".
Top-k targets: everything but the teacher's k likeliest tokens is one outcome, for the student as well. That is a
    divergence over k + 1 outcomes, and by the data-processing inequality never above the full one.
Limits: one backward pass per loss; the gradient of the gradient does not exist.

Shapes: N tokens, V vocabulary, k likeliest tokens, K = k + 1 outcomes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_prune.recovery.divergences import Divergence

__all__ = ["IGNORED", "FullTargets", "TokenLoss", "TopTargets", "check_labels", "check_vocabulary", "cross_entropy_sum"]

IGNORED = -100
# Float32 values per chunk: what stays in the cache of a CPU core, and what keeps an accelerator busy.
_CHUNK_CPU, _CHUNK_ACCELERATOR = 1 << 17, 1 << 25


@dataclass(frozen=True)
class FullTargets:
    """The teacher's logits over the whole vocabulary."""

    logits_NV: Tensor


@dataclass(frozen=True)
class TopTargets:
    """The teacher's k likeliest tokens: their log-probabilities, and last the one of all other tokens together."""

    log_probs_NK: Tensor
    ids_Nk: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, *, k: int, temperature: float) -> "TopTargets":
        """Keep the k likeliest tokens of each row.

        Args:
            logits_NV: the teacher's, in any float dtype.
            k: tokens to keep.
            temperature: divides the logits.

        Raises:
            ValueError: if no token is left for the rest.
        """
        num_tokens, vocab = logits_NV.shape
        if k >= vocab:
            raise ValueError(f"top_k must be under the vocabulary's {vocab} tokens, got {k}; leave it out to use all")
        log_probs_NK = logits_NV.new_empty((num_tokens, k + 1), dtype=torch.float32)
        ids_Nk = torch.empty((num_tokens, k), dtype=torch.int64, device=logits_NV.device)
        for rows in _chunks(logits_NV):
            log_p_NV = _log_softmax(logits_NV[rows], temperature)
            top_Nk, ids_Nk[rows] = log_p_NV.topk(k, dim=-1, sorted=False)
            rest_N = log_p_NV.exp_().scatter_(-1, ids_Nk[rows], 0.0).sum(-1)
            log_probs_NK[rows, :k] = top_Nk
            log_probs_NK[rows, k] = _log(rest_N)
        return cls(log_probs_NK, ids_Nk)


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """Options of the loss, and the loss itself.

    Args:
        divergence: from the teacher's distribution to the student's.
        temperature: divides both sides' logits in the divergence; targets with k tokens were made at it.
        scale: multiplies the divergence.
        ce_weight: of the cross-entropy, which is added.
        num_tokens: logits after these are left out on both sides; None takes all.
        label_smoothing: share of the cross-entropy that goes to all tokens alike, as in Transformers' LabelSmoother.
    """

    divergence: Divergence
    temperature: float = 1.0
    scale: float = 1.0
    ce_weight: float = 0.0
    num_tokens: int | None = None
    label_smoothing: float = 0.0

    def __call__(
        self, logits_NV: Tensor, targets: FullTargets | TopTargets, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over the tokens whose label counts.

        Args:
            logits_NV: the student's, in any float dtype.
            targets: the teacher's side of the same rows.
            labels_N: token ids; rows of -100 do not count and get no gradient, whatever the teacher says there.

        Returns:
            the loss, which alone carries a gradient; the divergence and the cross-entropy in it, unweighted, all
            sums over tokens in float32.

        Raises:
            ValueError: if teacher and student speak of different vocabularies, or a label is outside.
        """
        if isinstance(targets, FullTargets):
            check_vocabulary(logits_NV.shape[-1], targets.logits_NV.shape[-1], self.num_tokens)
        total, kd, ce = _Sum.apply(logits_NV, targets, labels_N, self)
        check_labels(labels_N, logits_NV[:, : self.num_tokens].shape[1])
        return total, kd, ce


def check_vocabulary(student: int, teacher: int, num_tokens: int | None) -> None:
    """Refuse logits over different tokens.

    Args:
        student: logits per token.
        teacher: logits per token.
        num_tokens: how many of them are compared, if not all.

    Raises:
        ValueError: if the sizes differ and nobody said how many tokens are shared, or fewer exist.
    """
    if num_tokens is None and student != teacher:
        raise ValueError(
            f"the teacher has a vocabulary of {teacher} tokens, the student of {student}; take a teacher with the "
            "student's tokenizer, or, if only the padding of the two heads differs, set distill.num_tokens to "
            "the length of the tokenizer they share"
        )
    if num_tokens is not None and num_tokens > min(student, teacher):
        raise ValueError(
            f"distill.num_tokens must be at most {min(student, teacher)}, the smaller of the vocabularies of student "
            f"({student}) and teacher ({teacher}), got {num_tokens}"
        )


def check_labels(labels_N: Tensor, num_tokens: int) -> None:
    """Refuse labels that no logit belongs to; on an accelerator this waits for what is computed.

    Args:
        labels_N: token ids, -100 where a token does not count.
        num_tokens: logits that are compared.

    Raises:
        ValueError: naming the first such label.
    """
    is_outside_N = (labels_N != IGNORED) & ((labels_N < 0) | (labels_N >= num_tokens))
    if bool(is_outside_N.any()):
        raise ValueError(
            f"a label is {int(labels_N[is_outside_N][0])}, but {num_tokens} tokens are compared, so it must be 0 to "
            f"{num_tokens - 1}, or {IGNORED} where a token does not count; does the tokenizer belong to the model?"
        )


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the ordinary cross-entropy, summed over the tokens whose label counts, in float32.

    Args:
        logits_NV: in any float dtype.
        labels_N: token ids, -100 where a token does not count.
        label_smoothing: see `TokenLoss`.
    """
    check_labels(labels_N, logits_NV.shape[-1])
    return torch.nn.functional.cross_entropy(
        logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )


class _Sum(torch.autograd.Function):
    """The loss and its gradient in one pass over the rows."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets: FullTargets | TopTargets, labels_N: Tensor, options: TokenLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_NV = torch.empty_like(logits_NV)
        kd, ce = logits_NV.new_zeros(2, dtype=torch.float32)
        ignored_N = labels_N == IGNORED
        for rows in _chunks(logits_NV):
            kd_N, ce_N, chunk_NV = _chunk(logits_NV[rows], targets, rows, labels_N[rows], options)
            out_N = ignored_N[rows]
            kd += kd_N.masked_fill_(out_N, 0.0).sum()
            ce += ce_N.masked_fill_(out_N, 0.0).sum()
            num_compared = chunk_NV.shape[1]
            grad_NV[rows, :num_compared] = chunk_NV.masked_fill_(out_N[:, None], 0.0)
            grad_NV[rows, num_compared:] = 0.0
        ctx.grad_NV = grad_NV
        ctx.mark_non_differentiable(kd, ce)
        ctx.set_materialize_grads(False)
        return options.scale * kd + options.ce_weight * ce, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        # Scaled in place, which saves a second tensor of the size of the logits.
        grad_NV, ctx.grad_NV = ctx.grad_NV, None
        if grad_NV is None:
            raise ValueError("the gradient of a distillation loss can be taken once; leave out retain_graph=True")
        return grad_NV.mul_(grad), None, None, None


def _chunk(
    logits_NV: Tensor, targets: FullTargets | TopTargets, rows: slice, labels_N: Tensor, options: TokenLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence and the cross-entropy of each row, and the gradient of their weighted sum."""
    logits_NV = logits_NV[:, : options.num_tokens]
    log_q_NV = _log_softmax(logits_NV, 1.0)
    # Kept inside, because an accelerator would stop at an index outside before `check_labels` could say which it is.
    index_N1 = labels_N.clamp(0, logits_NV.shape[1] - 1)[:, None]
    ce_N = -log_q_NV.gather(1, index_N1)[:, 0]
    if options.label_smoothing:
        ce_N = torch.lerp(ce_N, -log_q_NV.mean(1), options.label_smoothing)
    grad_ce_NV = log_q_NV.exp() if options.ce_weight else None
    if options.temperature != 1.0:
        log_q_NV = _log_softmax(logits_NV, options.temperature)
    if isinstance(targets, FullTargets):
        log_p_NV = _log_softmax(targets.logits_NV[rows, : options.num_tokens], options.temperature)
        kd_N, grad_NV = options.divergence.value_and_grad(log_p_NV, log_q_NV)
    else:
        kd_N, grad_NV = _grouped(log_q_NV, targets.log_probs_NK[rows], targets.ids_Nk[rows], options.divergence)
    if options.scale != options.temperature:
        grad_NV.mul_(options.scale / options.temperature)
    if grad_ce_NV is not None:
        smoothing = options.label_smoothing
        share_N1 = torch.full_like(index_N1, smoothing - 1.0, dtype=torch.float32)
        grad_ce_NV.scatter_add_(1, index_N1, share_N1)
        if smoothing:
            grad_ce_NV.sub_(smoothing / logits_NV.shape[1])
        grad_NV.add_(grad_ce_NV, alpha=options.ce_weight)
    return kd_N, ce_N, grad_NV


def _grouped(log_q_NV: Tensor, log_p_NK: Tensor, ids_Nk: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Compare over k tokens and one outcome for the others; return the value and the gradient by all V logits.

    The others' logits move their common outcome in proportion to their probability.
    """
    top_Nk = log_q_NV.gather(1, ids_Nk)
    q_NV = log_q_NV.exp_().scatter_(1, ids_Nk, 0.0)
    # Summed over the others rather than taken from 1, which would lose all digits of a small rest.
    rest_N = q_NV.sum(1).clamp_min_(torch.finfo(q_NV.dtype).tiny)
    log_q_NK = torch.cat([top_Nk, rest_N.log()[:, None]], dim=1)
    # Targets that were stored in half precision do not add up to one.
    value_N, grad_NK = divergence.value_and_grad(log_p_NK.float().log_softmax(1), log_q_NK)
    grad_NV = q_NV.mul_((grad_NK[:, -1] / rest_N)[:, None])
    return value_N, grad_NV.scatter_(1, ids_Nk, grad_NK[:, :-1])


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    scaled_NV = logits_NV.float()
    return torch.log_softmax(scaled_NV if temperature == 1.0 else scaled_NV / temperature, dim=-1)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp_min_(torch.finfo(probability.dtype).tiny).log_()


def _chunks(logits_NV: Tensor) -> list[slice]:
    budget = _CHUNK_CPU if logits_NV.device.type == "cpu" else _CHUNK_ACCELERATOR
    step = max(1, budget // logits_NV.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits_NV), step)]
