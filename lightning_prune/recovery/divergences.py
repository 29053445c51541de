"""How far the student's distribution over tokens is from the teacher's.

Each divergence speaks of any two distributions over the same K outcomes: the whole vocabulary, or the k likeliest
tokens of the teacher and one outcome for all others. The arithmetic is float32, and the gradient is closed, so that no
graph over the vocabulary is kept.

Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, arXiv 2407.14679, section
    3, "Logit-based KD" (forward KL was best); Gu et al., MiniLLM, arXiv 2306.08543, reverse KL; Agarwal et al.,
    On-Policy Distillation of Language Models, arXiv 2306.13649, generalized Jensen-Shannon divergence.

Shapes: N tokens, K outcomes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Divergence", "ForwardKL", "JensenShannon", "ReverseKL"]


class Divergence(ABC):
    """A distance between a teacher's distribution p and a student's q; zero where both are equal, else positive."""

    @abstractmethod
    def value_and_grad(self, log_p_NK: Tensor, log_q_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Compare two sets of distributions.

        Args:
            log_p_NK: the teacher's log-probabilities, float32; may be overwritten.
            log_q_NK: the student's, float32; may be overwritten.

        Returns:
            value_N in nats, and grad_NK: its gradient by logits z_NK with q = softmax(z).
        """


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(p || q): the student covers all that the teacher may say.

    Source: arXiv 2407.14679, section 3.
    """

    def value_and_grad(self, log_p_NK: Tensor, log_q_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum p (log p - log q), and q - p."""
        p_NK = log_p_NK.exp()
        value_N = _dot(p_NK, log_p_NK.sub_(log_q_NK))
        return value_N, log_q_NK.exp_().sub_(p_NK)


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(q || p): the student keeps to what the teacher finds likely.

    Source: arXiv 2306.08543, equation 1.
    """

    def value_and_grad(self, log_p_NK: Tensor, log_q_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum q (log q - log p), and q (log q - log p - value)."""
        q_NK = log_q_NK.exp()
        ratio_NK = log_q_NK.sub_(log_p_NK)
        value_N = _dot(q_NK, ratio_NK)
        return value_N, ratio_NK.sub_(value_N[:, None]).mul_(q_NK)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    """Between both KLs: beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q.

    Source: arXiv 2306.13649, equation 1.

    Args:
        beta: the teacher's share of the mixture, in (0, 1); 0.5 is the symmetric divergence.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must be in (0, 1), got {self.beta}; the ends are other classes: ForwardKL and ReverseKL"
            )

    def value_and_grad(self, log_p_NK: Tensor, log_q_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value, and (1 - beta) q (log q/m - KL(q || m))."""
        p_NK, q_NK = log_p_NK.exp(), log_q_NK.exp()
        # Clamped because an outcome that neither side gives any probability would be 0 * inf.
        log_m_NK = torch.lerp(q_NK, p_NK, self.beta).clamp_min_(torch.finfo(q_NK.dtype).tiny).log_()
        from_p_N = _dot(p_NK, log_p_NK.sub_(log_m_NK))
        ratio_NK = log_q_NK.sub_(log_m_NK)
        from_q_N = _dot(q_NK, ratio_NK)
        value_N = self.beta * from_p_N + (1 - self.beta) * from_q_N
        return value_N, ratio_NK.sub_(from_q_N[:, None]).mul_(q_NK).mul_(1 - self.beta)


def _dot(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_NK, b_NK)
