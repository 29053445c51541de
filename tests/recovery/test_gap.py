"""Shares of the gap, worked by hand; where there is none, the reason."""

import json
import math

import pytest

from lightning_prune.recovery.gap import Effort, HeldOutLoss, Measurement, RecoveryReport, recovered_share


def moment(nats, **results):
    return Measurement(loss=HeldOutLoss(nats=nats, num_tokens=1000, data="stories"), results=results)


def gap_of(report, metric):
    return next(gap for gap in report.gaps() if gap.metric == metric)


@pytest.mark.parametrize(
    ("before", "pruned", "recovered", "higher_is_better", "share"),
    [
        (1.5, 2.5, 1.75, False, 0.75),  # three quarters of one nat
        (1.5, 2.5, 1.5, False, 1.0),
        (1.5, 2.5, 1.25, False, 1.25),  # better than dense
        (1.5, 2.5, 3.0, False, -0.5),  # worse than pruned
        (0.75, 0.5, 0.625, True, 0.5),
        (0.75, 0.5, 0.25, True, -1.0),
    ],
)
def test_share_of_the_gap(before, pruned, recovered, higher_is_better, share):
    assert recovered_share(before, pruned, recovered, higher_is_better=higher_is_better, noise=0.01) == share


@pytest.mark.parametrize(
    ("before", "pruned", "recovered", "noise", "reason"),
    [
        (2.0, 2.0, 1.0, 0.0, "does not exceed its noise"),
        (2.0, 2.25, 1.0, 0.25, "gap of 0.25 does not exceed its noise of 0.25"),
        (2.0, 1.0, 1.5, 0.25, "did no harm"),
        (2.0, math.inf, 1.5, 0.25, "not finite"),
        (2.0, 3.0, math.nan, 0.25, "not finite"),
    ],
)
def test_no_share_without_a_gap(before, pruned, recovered, noise, reason):
    with pytest.raises(ValueError, match=reason):
        recovered_share(before, pruned, recovered, higher_is_better=False, noise=noise)


def test_every_measure_knows_its_direction_and_its_noise():
    report = RecoveryReport(
        before=moment(1.5, cloze={"acc": 0.75, "acc_stderr": 0.03}, text={"word_perplexity": 10.0}),
        pruned=moment(2.5, cloze={"acc": 0.5, "acc_stderr": 0.04}, text={"word_perplexity": 20.0}),
        recovered=moment(2.0, cloze={"acc": 0.625, "acc_stderr": 0.04}, text={"word_perplexity": 12.5}),
    )
    shares = {(gap.task, gap.metric): gap.share for gap in report.gaps()}
    assert shares == {("", "loss"): 0.5, ("cloze", "acc"): 0.5, ("text", "word_perplexity"): 0.75}


def test_gap_within_its_standard_errors_has_no_share():
    # 0.03 and 0.04 in quadrature are 0.05
    at = [{"acc": value, "acc_stderr": error} for value, error in ((0.54, 0.03), (0.5, 0.04), (0.53, 0.04))]
    report = RecoveryReport(**{name: moment(2.0, task=m) for name, m in zip(FIELDS, at, strict=True)})
    gap = gap_of(report, "acc")
    assert gap.share is None
    assert gap.note == "the gap of 0.04 does not exceed its noise of 0.05"
    assert gap_of(report, "loss").note.startswith("the gap of 0 does not exceed its noise of 0.001")


FIELDS = ("before", "pruned", "recovered")


def test_filtered_metrics_find_their_error():
    at = [{"acc,flex": value, "acc_stderr,flex": 0.1} for value in (0.54, 0.5, 0.53)]
    report = RecoveryReport(**{name: Measurement(results={"t": m}) for name, m in zip(FIELDS, at, strict=True)})
    assert [gap.metric for gap in report.gaps()] == ["acc,flex"]
    assert "noise of 0.14" in report.gaps()[0].note


def test_what_was_not_measured_is_said():
    report = RecoveryReport(pruned=moment(2.5, odd={"speed": 3.0}), recovered=moment(2.0))
    assert gap_of(report, "loss").note == "not measured before pruning"
    assert gap_of(report, "speed").note == "not measured before pruning and after recovery"
    known = RecoveryReport(**{name: moment(2.0, odd={"speed": 3.0}) for name in FIELDS})
    assert gap_of(known, "speed").note == "whether higher is better is not known"


@pytest.mark.parametrize(("data", "num_tokens"), [("news", 1000), ("stories", 999)])
def test_losses_of_different_texts_have_no_share(data, num_tokens):
    other = Measurement(loss=HeldOutLoss(nats=2.0, num_tokens=num_tokens, data=data))
    report = RecoveryReport(before=moment(1.5), pruned=moment(2.5), recovered=other)
    assert gap_of(report, "loss").share is None
    assert gap_of(report, "loss").note == "the losses are of different texts"


def test_plain_values_and_the_sentence():
    effort = Effort(num_trained=500, num_parameters=20_000, num_tokens=4096, seconds=12.4)
    report = RecoveryReport(before=moment(1.5), pruned=moment(2.5), recovered=moment(1.75), effort=effort)
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["effort"]["trained_share"] == 0.025
    assert plain["moments"]["pruned"]["loss"]["perplexity"] == pytest.approx(math.exp(2.5))
    assert plain["gaps"][0]["share"] == 0.75
    assert report.sentence() == (
        "loss 1.5 -> 2.5 -> 1.75 (75% of the gap recovered); trained 500 of 20,000 parameters (2.50%) on 4,096 tokens "
        "in 12 s"
    )
    assert RecoveryReport().sentence() == "nothing was measured"


def test_perplexity_of_a_diverged_model_is_infinite():
    assert HeldOutLoss(nats=1e4, num_tokens=1, data="x").perplexity == math.inf
