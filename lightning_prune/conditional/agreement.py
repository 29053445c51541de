"""Count how often two answers agree, by how sure the first was, and how sure one must be for a wanted agreement.

Shapes: E exits, N tokens, K bins of confidence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MIN_SEEN", "NUM_BINS", "count", "threshold"]

NUM_BINS = 256  # a power of two, so that the edges are exact
MIN_SEEN = 100.0  # tokens above a threshold, fewer of which say nothing


def count(
    confidence_EN: Tensor, agrees_EN: Tensor, thresholds: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Count the tokens that come to each exit.

    Args:
        confidence_EN: in [0, 1].
        agrees_EN: bool, whether the answer of the exit is the model's.
        thresholds: one number per exit; who reaches it does not come to later exits.

    Returns:
        float32 (E, 2, K), how many came and how many of them agreed, by confidence; and how many left at all, how many
        of them agreed, and how many there were.
    """
    there_N = torch.ones_like(agrees_EN[0])
    agreed = confidence_EN.new_zeros(())
    found = []
    for confidence_N, agrees_N, edge in zip(confidence_EN, agrees_EN, thresholds, strict=True):
        bins_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        seen_K, agreed_K = (
            torch.zeros(NUM_BINS, device=bins_N.device).index_add_(0, bins_N, which.float())
            for which in (there_N, there_N & agrees_N)
        )
        found.append(torch.stack([seen_K, agreed_K]))
        leaves_N = there_N & (confidence_N >= edge)
        agreed = agreed + (leaves_N & agrees_N).sum()
        there_N = there_N & ~leaves_N
    return torch.stack(found), ((~there_N).sum(), agreed, torch.tensor(float(len(there_N))))


def threshold(seen_K: Tensor, agreed_K: Tensor, agreement: float) -> float:
    """Return the lowest edge of a bin at and above which enough were seen and agreed as often as is wanted.

    Args:
        seen_K: tokens by confidence.
        agreed_K: those of them that agreed.
        agreement: share that must agree.

    Returns:
        infinity if there is no such edge.
    """
    seen, agreed = (values.double().flip(0).cumsum(0).flip(0) for values in (seen_K, agreed_K))
    good = (seen >= MIN_SEEN) & (agreed >= agreement * seen)
    return float("inf") if not bool(good.any()) else int(good.nonzero()[0]) / NUM_BINS
