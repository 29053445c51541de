"""Measure how much a model suffers when something is removed from it: the criteria of the greedy depth search.

Next-token losses ask how well the text is predicted; divergences compare the logits with those of the intact model and
need no labels. Every criterion is prepared once for a model and its batches and then called with what is removed.

Source: SLEB, arXiv 2402.09025 (loss of the text); BlockPruner, arXiv 2406.10594 (perplexity, mean per sequence first);
    FinerCut, arXiv 2405.18218 (divergences of the output; its released code swaps the arguments of KL and averages
    over the vocabulary too, here they are the textbook formulas).
Cost: one pass over the batches per call; divergences a second one, or float logits of all tokens kept in memory.
Limits: models that return `logits` with one distribution per position.

Shapes: B sequences, T positions, N chosen positions, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.calibration.walk import evaluating, to_device

__all__ = [
    "Criterion",
    "JensenShannon",
    "KullbackLeibler",
    "LogitAngle",
    "LogitDistance",
    "NextTokenLoss",
    "SequencePerplexity",
    "intact",
    "js_divergence",
    "kl_divergence",
    "logit_angle",
    "logit_distance",
    "model_logits",
    "next_token_targets",
    "sequence_losses",
    "sequence_mean",
    "token_mean",
]

Batch = Mapping[str, Tensor]
Removed = Callable[[], AbstractContextManager[object]]
Evaluate = Callable[[Removed], float]
IGNORED = -100


def next_token_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what each position but the last has to predict, and which of them count.

    Args:
        batch: `input_ids`; `attention_mask` leaves out padding; `labels`, if given, are predicted in place of the
            ids, -100 left out.

    Returns:
        targets and a boolean choice, both one position shorter than the ids.
    """
    labels_BT = batch.get("labels", batch["input_ids"])
    chosen_BT = labels_BT[:, 1:] != IGNORED
    if (mask_BT := batch.get("attention_mask")) is not None:
        chosen_BT = chosen_BT & mask_BT[:, 1:].bool() & mask_BT[:, :-1].bool()
    return labels_BT[:, 1:], chosen_BT


def sequence_losses(
    logits_BTV: Tensor, targets_BT: Tensor, chosen_BT: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Sum the negative log likelihood of the targets over each sequence.

    Args:
        logits_BTV: position t predicts target t.
        targets_BT: token ids.
        chosen_BT: bool, which positions count.
        chunk: positions whose float32 copy is held at once.

    Returns:
        sum_B and count_B, float64.
    """
    rows_N = chosen_BT.flatten().nonzero().squeeze(1)
    width = chosen_BT.shape[1]
    sum_B = torch.zeros(chosen_BT.shape[0], dtype=torch.float64, device=logits_BTV.device)
    for part_N in rows_N.split(chunk):
        sequence_N, position_N = part_N // width, part_N % width
        target_N = targets_BT[sequence_N, position_N]
        nll_N = functional.cross_entropy(logits_BTV[sequence_N, position_N].float(), target_N, reduction="none")
        sum_B.index_add_(0, sequence_N, nll_N.double())
    return sum_B, chosen_BT.sum(1).double()


def token_mean(sum_B: Tensor, count_B: Tensor) -> Tensor:
    """Return numerator and denominator of the mean loss per token."""
    return torch.stack([sum_B.sum(), count_B.sum()])


def sequence_mean(sum_B: Tensor, count_B: Tensor) -> Tensor:
    """Return numerator and denominator of the mean over sequences of their mean loss; empty ones are left out."""
    means_B = sum_B[count_B > 0] / count_B[count_B > 0]
    return torch.stack([means_B.sum(), torch.ones_like(means_B).sum()])


def js_divergence(logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence per position, in nats, between 0 and ln 2."""
    p_NV, q_NV = intact_NV.float().softmax(-1), logits_NV.float().softmax(-1)
    mean_NV = ((p_NV + q_NV) / 2).clamp(min=torch.finfo(torch.float32).tiny)
    parts_NV = torch.special.xlogy(p_NV, p_NV / mean_NV) + torch.special.xlogy(q_NV, q_NV / mean_NV)
    return (parts_NV.sum(-1) / 2).clamp(0, math.log(2))


def kl_divergence(logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
    """Return KL(intact || changed) per position, in nats, >= 0."""
    log_p_NV, log_q_NV = intact_NV.float().log_softmax(-1), logits_NV.float().log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).clamp(min=0)


def logit_angle(logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
    """Return the angle between the logits per position, in radians; exact also where it is small."""
    a_NV, b_NV = functional.normalize(logits_NV.float(), dim=-1), functional.normalize(intact_NV.float(), dim=-1)
    return 2 * torch.atan2((a_NV - b_NV).norm(dim=-1), (a_NV + b_NV).norm(dim=-1))


def logit_distance(logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
    """Return the L2 norm of the difference of the logits per position."""
    return (logits_NV.float() - intact_NV.float()).norm(dim=-1)


def model_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """Run a batch without gradients and return its logits, and the batch on the model's device."""
    moved: dict[str, Any] = to_device(batch, next(model.parameters()).device)
    with torch.no_grad():
        output: Any = model(**{key: value for key, value in moved.items() if key != "labels"})
    return output.logits, moved


class Criterion(ABC):
    """A number that grows with the harm of a removal."""

    @abstractmethod
    def prepare(self, model: nn.Module, batches: Sequence[Batch]) -> Evaluate:
        """Return a function that gives the criterion of the model inside the context it is called with.

        Under several processes each brings its own batches; all get the same number.
        """


@dataclass(frozen=True, kw_only=True)
class NextTokenLoss(Criterion):
    """Mean negative log likelihood per token, in nats."""

    chunk: int = 1024

    def __post_init__(self) -> None:
        at_least(1, chunk=self.chunk)

    def prepare(self, model: nn.Module, batches: Sequence[Batch]) -> Evaluate:
        """Return the loss as a function of what is removed."""
        _check_batches(batches)
        return lambda removed: _mean_everywhere(token_mean(*_losses(model, batches, removed, self.chunk)))


@dataclass(frozen=True, kw_only=True)
class SequencePerplexity(Criterion):
    """BlockPruner's perplexity: exp of the mean over sequences of their mean loss."""

    chunk: int = 1024

    def __post_init__(self) -> None:
        at_least(1, chunk=self.chunk)

    def prepare(self, model: nn.Module, batches: Sequence[Batch]) -> Evaluate:
        """Return the perplexity as a function of what is removed."""
        _check_batches(batches)
        return lambda removed: _exp(_mean_everywhere(sequence_mean(*_losses(model, batches, removed, self.chunk))))


def _exp(value: float) -> float:
    """Return e to the value, infinity where that is too large for a float."""
    return math.exp(value) if value < 700 else math.inf


def _check_batches(batches: Sequence[Batch]) -> None:
    if not batches:
        raise ValueError("got no calibration batches; give a list with at least one")


def _mean_everywhere(fraction: Tensor) -> float:
    """Divide numerator by denominator, both summed over all processes."""
    total, count = distributed.sum_everywhere(fraction).tolist()
    if not count:
        raise ValueError("no token counts: all are padding or have the label -100; check attention_mask and labels")
    return float(total / count)


def _losses(model: nn.Module, batches: Sequence[Batch], removed: Removed, chunk: int) -> tuple[Tensor, Tensor]:
    """Return sum and count of the losses of all sequences."""
    parts = []
    with evaluating(model), removed():
        for batch in batches:
            logits_BTV, moved = model_logits(model, batch)
            parts.append(sequence_losses(logits_BTV[:, :-1], *next_token_targets(moved), chunk=chunk))
    sums, counts = zip(*parts, strict=True)
    return torch.cat(sums), torch.cat(counts)


@dataclass(frozen=True, kw_only=True)
class Divergence(Criterion):
    """Mean over tokens of a comparison with the logits of the intact model.

    Args:
        keep_logits: whether the intact logits are kept in main memory (T * V numbers in the model's dtype) or computed
            again for every call.
        chunk: positions compared at once.
    """

    keep_logits: bool = False
    chunk: int = 256

    def __post_init__(self) -> None:
        at_least(1, chunk=self.chunk)

    @abstractmethod
    def compare(self, logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
        """Return one number per position, 0 where the two agree."""

    def prepare(self, model: nn.Module, batches: Sequence[Batch]) -> Evaluate:
        """Return the mean divergence as a function of what is removed."""
        _check_batches(batches)
        kept: list[Tensor] = []
        if self.keep_logits:
            with evaluating(model):
                kept = [model_logits(model, batch)[0].cpu() for batch in batches]

        def evaluate(removed: Removed) -> float:
            device = next(model.parameters()).device
            fraction = torch.zeros(2, dtype=torch.float64, device=device)
            with evaluating(model):
                for index, batch in enumerate(batches):
                    intact_BTV = kept[index] if kept else model_logits(model, batch)[0]
                    with removed():
                        logits_BTV, moved = model_logits(model, batch)
                    values_N = self._compare_all(logits_BTV, intact_BTV, moved.get("attention_mask")).double()
                    fraction += torch.stack([values_N.sum(), torch.ones_like(values_N).sum()])
            return _mean_everywhere(fraction)

        return evaluate

    def _compare_all(self, logits_BTV: Tensor, intact_BTV: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Compare the positions that are not padding, some at a time."""
        shape = logits_BTV.shape[:2]
        chosen_BT = mask_BT.bool() if mask_BT is not None else torch.ones(shape, dtype=torch.bool)
        rows_N = chosen_BT.flatten().nonzero().squeeze(1).to(logits_BTV.device)
        logits_MV, intact_MV = logits_BTV.flatten(0, 1), intact_BTV.flatten(0, 1)
        values = [
            self.compare(logits_MV[part_N], intact_MV[part_N.to(intact_MV.device)].to(logits_MV.device))
            for part_N in rows_N.split(self.chunk)
        ]
        return torch.cat(values)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    """Jensen-Shannon divergence from the intact model, in nats."""

    def compare(self, logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
        """Return the divergence per position."""
        return js_divergence(logits_NV, intact_NV)


@dataclass(frozen=True, kw_only=True)
class KullbackLeibler(Divergence):
    """KL divergence of the changed from the intact model, in nats."""

    def compare(self, logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
        """Return the divergence per position."""
        return kl_divergence(logits_NV, intact_NV)


@dataclass(frozen=True, kw_only=True)
class LogitAngle(Divergence):
    """Angle between the logits and those of the intact model, in radians."""

    def compare(self, logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
        """Return the angle per position."""
        return logit_angle(logits_NV, intact_NV)


@dataclass(frozen=True, kw_only=True)
class LogitDistance(Divergence):
    """L2 distance between the logits and those of the intact model."""

    def compare(self, logits_NV: Tensor, intact_NV: Tensor) -> Tensor:
        """Return the distance per position."""
        return logit_distance(logits_NV, intact_NV)


def intact() -> AbstractContextManager[object]:
    """Remove nothing."""
    return nullcontext()
