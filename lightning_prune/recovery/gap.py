"""What recovery won back of the quality that pruning cost, and what it took.

Three moments are compared: before pruning, right after, after recovery. The share of the gap recovered is

    (pruned - recovered) / (pruned - before)

for every measure, whichever way it improves: 1 when recovery is back at the dense model, above 1 when it is better,
below 0 when it made things worse. A gap that is not larger than the noise of its two ends has no share: the ratio
would be a random number of any size.

Noise: of a loss, `LOSS_NOISE`; of a metric, its two standard errors added in quadrature, or, without them, a thousandth
of the larger end. Both moments answer the same questions, which makes the true noise smaller than that.

Source: arXiv 2312.15230 compares retraining by what it closes of the gap to the dense model; the guard is ours.
Cost: none; the measurements are passed in.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LOSS_NOISE", "Effort", "Gap", "HeldOutLoss", "Measurement", "RecoveryReport", "recovered_share"]

LOSS_NOISE = 1e-3  # nats per token, a tenth of a percent of perplexity
_RELATIVE_NOISE = 1e-3
_ERROR = "_stderr"
# Whether higher is better, as lm-eval 0.4 registers its metrics.
_HIGHER_IS_BETTER = {
    **dict.fromkeys(("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "exact_match", "f1", "mcc"), True),
    **dict.fromkeys(("likelihood", "bleu", "chrf", "chrf++"), True),
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score"), False),
}


def recovered_share(before: float, pruned: float, recovered: float, *, higher_is_better: bool, noise: float) -> float:
    """Return the share of the gap between `before` and `pruned` that recovery has closed.

    Args:
        before: the measure of the dense model.
        pruned: right after pruning.
        recovered: after recovery.
        higher_is_better: whether pruning is expected to lower the measure.
        noise: what the gap must exceed, in the unit of the measure.

    Raises:
        ValueError: if there is no share, saying why.

    >>> recovered_share(1.5, 2.5, 1.75, higher_is_better=False, noise=0.001)
    0.75
    """
    if not all(math.isfinite(value) for value in (before, pruned, recovered)):
        raise ValueError("a measurement is not finite")
    damage = before - pruned if higher_is_better else pruned - before
    if damage < -noise:
        raise ValueError("pruning did no harm here")
    if damage <= noise or damage == 0:
        raise ValueError(f"the gap of {damage:.2g} does not exceed its noise of {noise:.2g}")
    return (pruned - recovered) / (pruned - before)


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """The loss of one model on held-out text.

    Args:
        nats: mean over tokens.
        num_tokens: predicted, those left out not counted.
        data: which text, in words.
    """

    nats: float
    num_tokens: int
    data: str

    @property
    def perplexity(self) -> float:
        """Return exp of the loss; infinite where that is too large for a float."""
        return math.exp(self.nats) if self.nats < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The quality of the model at one moment.

    Args:
        loss: None if it was not measured.
        results: task -> metric -> value as lm-eval names them; standard errors are called `<metric>_stderr`.
    """

    loss: HeldOutLoss | None = None
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def values(self) -> dict[tuple[str, str], tuple[float, float | None]]:
        """Return (task, metric) -> (value, its standard error); the loss belongs to no task."""
        found: dict[tuple[str, str], tuple[float, float | None]] = {}
        if self.loss is not None:
            found["", "loss"] = (self.loss.nats, LOSS_NOISE / math.sqrt(2))
        for task, metrics in self.results.items():
            for name, value in metrics.items():
                metric, _, filter_name = name.partition(",")
                if not metric.endswith(_ERROR):
                    error = metrics.get(f"{metric}{_ERROR},{filter_name}" if filter_name else f"{metric}{_ERROR}")
                    found[task, name] = (value, error)
        return found

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Measurement":
        """Undo `as_dict`."""
        names = ("nats", "num_tokens", "data")
        loss = saved["loss"] and HeldOutLoss(**{name: saved["loss"][name] for name in names})
        return cls(loss=loss, results=saved["results"])

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        loss = self.loss and {**asdict(self.loss), "perplexity": self.loss.perplexity}
        return {"loss": loss, "results": {task: dict(metrics) for task, metrics in self.results.items()}}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What recovery took.

    Args:
        num_trained: parameters that were trained, those of adapters included.
        num_parameters: of the model without adapters.
        num_tokens: read in training, over all processes, padding left out.
        seconds: of the recovery alone, wall time.
    """

    num_trained: int
    num_parameters: int
    num_tokens: int
    seconds: float

    @property
    def trained_share(self) -> float:
        """Return trained parameters over parameters of the model."""
        return self.num_trained / self.num_parameters

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {**asdict(self), "trained_share": self.trained_share}


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One measure over the three moments; `share` is None where there is none, and `note` says why."""

    task: str
    metric: str
    before: float | None
    pruned: float | None
    recovered: float | None
    share: float | None
    note: str = ""


def _higher_is_better(task: str, metric: str) -> bool | None:
    return False if not task else _HIGHER_IS_BETTER.get(metric.partition(",")[0])


def _noise(before: tuple[float, float | None], pruned: tuple[float, float | None]) -> float:
    errors = [error for _, error in (before, pruned) if error is not None and math.isfinite(error)]
    if len(errors) == 2 and any(errors):
        return math.hypot(*errors)
    return _RELATIVE_NOISE * max(abs(before[0]), abs(pruned[0]))


@dataclass(frozen=True, kw_only=True)
class RecoveryReport:
    """Quality at three moments and the effort between the last two.

    Args:
        before: of the dense model; None if it was not measured, as where training starts from a pruned model.
        pruned: right after pruning, before any recovery.
        recovered: at the end.
        effort: None if nothing was trained.

    Losses of different texts have no share: a report at the end of a long training states that and does not fail.
    """

    before: Measurement | None = None
    pruned: Measurement | None = None
    recovered: Measurement | None = None
    effort: Effort | None = None

    @property
    def _moments(self) -> dict[str, Measurement | None]:
        return {"before": self.before, "pruned": self.pruned, "recovered": self.recovered}

    @property
    def _is_same_text(self) -> bool:
        return len({(m.loss.data, m.loss.num_tokens) for m in self._moments.values() if m and m.loss}) < 2

    def gaps(self) -> tuple[Gap, ...]:
        """Return every measure that was taken at any moment, the loss first."""
        values = {moment: m.values() if m else {} for moment, m in self._moments.items()}
        keys = dict.fromkeys(key for found in values.values() for key in found)
        return tuple(self._gap(key, {moment: found.get(key) for moment, found in values.items()}) for key in keys)

    def _gap(self, key: tuple[str, str], at: Mapping[str, tuple[float, float | None] | None]) -> Gap:
        share, note = None, ""
        before, pruned, recovered = at["before"], at["pruned"], at["recovered"]
        higher_is_better = _higher_is_better(*key)
        if before is None or pruned is None or recovered is None:
            words = {"before": "before pruning", "pruned": "right after pruning", "recovered": "after recovery"}
            note = f"not measured {' and '.join(words[moment] for moment, value in at.items() if value is None)}"
        elif not key[0] and not self._is_same_text:
            note = "the losses are of different texts"
        elif higher_is_better is None:
            note = "whether higher is better is not known"
        else:
            try:
                noise, kind = _noise(before, pruned), higher_is_better
                share = recovered_share(before[0], pruned[0], recovered[0], higher_is_better=kind, noise=noise)
            except ValueError as reason:
                note = str(reason)
        ends = {moment: value and value[0] for moment, value in at.items()}
        return Gap(task=key[0], metric=key[1], **ends, share=share, note=note)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON and for the report page."""
        return {
            "moments": {moment: m and m.as_dict() for moment, m in self._moments.items()},
            "gaps": [asdict(gap) for gap in self.gaps()],
            "effort": self.effort and self.effort.as_dict(),
        }

    def sentence(self) -> str:
        """Say it in one line for the log."""
        said = [_said(gap) for gap in self.gaps()] or ["nothing was measured"]
        if self.effort is not None:
            effort = self.effort
            said.append(
                f"trained {effort.num_trained:,} of {effort.num_parameters:,} parameters ({effort.trained_share:.2%}) "
                f"on {effort.num_tokens:,} tokens in {effort.seconds:.0f} s"
            )
        return "; ".join(said)


def _said(gap: Gap) -> str:
    ends = " -> ".join("?" if value is None else f"{value:.4g}" for value in (gap.before, gap.pruned, gap.recovered))
    name = f"{gap.task}: {gap.metric}" if gap.task else gap.metric
    return f"{name} {ends} ({gap.note if gap.share is None else f'{gap.share:.0%} of the gap recovered'})"
