"""Compare what is read from several streams with the model's own answer, without keeping any logits.

The gradient reaches the streams and nothing else: neither the weights that read them nor the model's own stream.

Shapes: N tokens, D channels of the stream, E streams, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.recovery.divergences import ForwardKL

__all__ = ["imitate"]

_MOST = 2**25  # logits at a time


def imitate(
    readout: Callable[[Tensor], Tensor], final_ND: Tensor, streams: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Compare streams with the final one.

    Args:
        readout: from a stream to logits.
        final_ND: the model's own.
        streams: (N, D) each.

    Returns:
        KL(final || stream) as the mean over tokens, in nats, (E) with a gradient; whether the likeliest answers are
        the same, bool (E, N); the entropy in nats of what each stream gives, (E, N); V.
    """
    found: tuple[Tensor, Tensor, Tensor, int] = _Imitation.apply(readout, final_ND, *streams)
    return found


class _Imitation(torch.autograd.Function):
    """Keeps the gradient by the streams."""

    @staticmethod
    def forward(ctx: Any, readout: Callable[[Tensor], Tensor], final_ND: Tensor, *streams: Tensor) -> Any:
        number, num_answers = max(1, len(final_ND)), 0
        kl_E = torch.zeros(len(streams), device=final_ND.device)
        agrees_EN = torch.zeros(len(streams), len(final_ND), dtype=torch.bool, device=final_ND.device)
        entropy_EN = torch.zeros(len(streams), len(final_ND), device=final_ND.device)
        grads = [torch.zeros_like(stream) for stream in streams]
        start, step = 0, 64
        while start < len(final_ND):
            part = slice(start, start + step)
            log_p = torch.log_softmax(readout(final_ND[part]), dim=-1)
            for index, stream in enumerate(streams):
                with torch.enable_grad():
                    leaf = stream[part].detach().requires_grad_()
                    logits = readout(leaf)
                log_q = torch.log_softmax(logits.detach(), dim=-1)
                agrees_EN[index, part] = log_q.argmax(-1) == log_p.argmax(-1)
                entropy_EN[index, part] = -(log_q.exp() * log_q).sum(-1)
                value_N, by_logits = ForwardKL().value_and_grad(log_p.clone(), log_q)
                kl_E[index] += value_N.sum() / number
                grads[index][part] = torch.autograd.grad(logits, leaf, by_logits / number)[0]
            num_answers = log_p.shape[-1]
            start, step = start + step, max(1, _MOST // num_answers)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(agrees_EN, entropy_EN)
        return kl_E, agrees_EN, entropy_EN, num_answers

    @staticmethod
    def backward(ctx: Any, by_kl_E: Tensor, *_: Any) -> Any:
        return (None, None, *(g * by.to(g.dtype) for g, by in zip(ctx.saved_tensors, by_kl_E, strict=True)))
