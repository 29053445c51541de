"""The continued schedule: the curve by hand, resumes under another length, second trainings, plain states."""

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_prune.recovery.learning_rate import ContinuedSchedule, Curve, LearningRate, planned, stretched

COSINE = LearningRate(warmup=10, final=0.1)


def make(options: LearningRate, total_steps: int, **given: Any) -> ContinuedSchedule:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 0.01}]
    return ContinuedSchedule(torch.optim.SGD(groups, lr=1.0), options, total_steps=total_steps, **given)


def run(schedule: ContinuedSchedule, num_steps: int) -> list[float]:
    """Take steps; return the rate of the first group in each."""
    rates = []
    for _ in range(num_steps):
        rates.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return rates


def saved(schedule: ContinuedSchedule) -> dict[str, Any]:
    """Return the state after a trip through a file that may hold plain values only."""
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def resumed(schedule: ContinuedSchedule, options: LearningRate, total_steps: int) -> ContinuedSchedule:
    """Make a new optimizer and schedule and load both, as a trainer does."""
    again = make(options, total_steps)
    again.optimizer.load_state_dict(copy.deepcopy(schedule.optimizer.state_dict()))
    again.load_state_dict(saved(schedule))
    return again


def falls(rates: list[float]) -> bool:
    return all(later <= earlier for earlier, later in itertools.pairwise(rates))


def test_warmup_and_cosine_by_hand() -> None:
    rates = run(make(COSINE, 110), 111)
    assert rates[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half-way
    assert rates[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.1)


def test_linear_constant_and_the_base_rates_of_groups() -> None:
    schedule = make(LearningRate(decay="linear", final=0.0, warmup=0.2), 10)
    assert run(schedule, 10) == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert schedule.get_last_lr() == pytest.approx([0.0, 0.0])
    schedule = make(LearningRate(decay="constant"), 10)
    assert run(schedule, 5) == [1.0] * 5
    assert schedule.get_last_lr() == [1.0, 0.01]


@pytest.mark.parametrize("at", [0, 4, 10, 37, 110])
def test_a_resume_of_the_same_length_is_bit_identical(at: int) -> None:
    whole = run(make(COSINE, 110), 110)
    schedule = make(COSINE, 110)
    assert run(schedule, at) + run(resumed(schedule, COSINE, 110), 110 - at) == whole


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("longer", [400, 80, 61])
def test_what_is_left_is_stretched_over_what_is_left(decay: Any, longer: int) -> None:
    options = LearningRate(warmup=10, decay=decay, final=0.1)
    schedule = make(options, 110)
    before = run(schedule, 60)
    again = resumed(schedule, options, longer)
    after = run(again, longer - 60)
    assert after[0] == run(schedule, 1)[0]  # no jump
    assert falls(before[10:] + after)
    assert again.get_last_lr()[0] == pytest.approx(0.1)
    old = planned(options, 110)  # the curve has 50 steps left, which take longer - 60 now
    expected = [
        old.final + (1 - old.final) * shape(decay, 0.5 + 0.5 * step / (longer - 60)) for step in range(longer - 60)
    ]
    assert after == pytest.approx(expected)


def shape(decay: str, progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2 if decay == "cosine" else 1 - progress


def test_several_changes_of_length_still_fall_to_the_end() -> None:
    schedule, rates, step = make(COSINE, 100), [], 0
    for total, until in ((100, 30), (300, 90), (120, 100), (1000, 1000)):
        schedule = resumed(schedule, COSINE, total)
        rates += run(schedule, until - step)
        step = until
    assert falls(rates[10:])
    assert max(abs(a - b) for a, b in itertools.pairwise(rates[10:])) < 0.05
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)


def test_in_the_middle_of_the_warmup() -> None:
    options = LearningRate(warmup=0.1, final=0.0)
    schedule = make(options, 200)  # 20 steps of warm-up
    before = run(schedule, 10)
    rates = run(resumed(schedule, options, 400), 390)  # 40 now, of which 30 are left
    assert rates[0] == pytest.approx(11 / 21)
    assert rates[15] == pytest.approx((11 / 21 + 1) / 2)
    assert rates[30] == 1.0
    assert falls(rates[30:])
    rates = run(resumed(schedule, options, 50), 40)  # 5 now, over already: it falls from where it stands
    assert rates[0] > before[-1]
    assert falls(rates)
    assert rates[20] == pytest.approx(11 / 21 / 2)


def test_a_training_cut_off_where_it_stands_keeps_its_rate() -> None:
    schedule = make(COSINE, 110)
    run(schedule, 60)
    again = resumed(schedule, COSINE, 40)
    assert again.get_last_lr() == schedule.get_last_lr()


def test_another_decay_or_end_starts_from_the_present_value() -> None:
    schedule = make(COSINE, 110)
    run(schedule, 60)
    rates = run(resumed(schedule, LearningRate(decay="linear", final=0.0), 110), 50)
    assert rates == pytest.approx([0.55 * (1 - step / 50) for step in range(50)])
    assert run(resumed(schedule, LearningRate(decay="constant"), 200), 140) == pytest.approx([0.55] * 140)
    low = run(resumed(schedule, LearningRate(final=0.9), 200), 140)
    assert low == pytest.approx([0.55] * 140)  # it would have to rise


def test_two_trainings_with_one_length_are_one() -> None:
    options = LearningRate(warmup=10, final=0.1, total_steps=110)
    first = make(options, 60)
    rates = run(first, 60)
    second = make(options, 50, state=saved(first))
    third_state = None
    rates += run(second, 20)
    third_state = saved(second)
    rates += run(make(options, 30, state=third_state), 30)
    assert rates == run(make(COSINE, 110), 110)


def test_a_second_training_without_a_common_length_takes_what_is_left() -> None:
    first = make(COSINE, 110)
    run(first, 60)
    second = make(LearningRate(warmup=5, final=0.1), 200, state=saved(first))
    rates = run(second, 100)
    assert rates[0] == pytest.approx(0.55)
    assert falls(rates)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * 0.75)) / 2  # half of what was left, by step 100 of 200
    assert second.get_last_lr()[0] == pytest.approx(expected)
    again = resumed(second, COSINE, 200)  # and a resume of the second
    assert again.get_last_lr() == second.get_last_lr()
    assert run(again, 100) == run(second, 100)
    assert again.get_last_lr()[0] == pytest.approx(0.1)


def test_a_second_training_after_the_end_or_in_the_warmup() -> None:
    first = make(COSINE, 20)
    run(first, 20)
    assert run(make(COSINE, 50, state=saved(first)), 50) == pytest.approx([0.1] * 50)
    lower = make(LearningRate(decay="linear", final=0.0), 10, state=saved(first))
    assert run(lower, 10) == pytest.approx([0.1 * (1 - step / 10) for step in range(10)])
    first = make(COSINE, 110)
    run(first, 5)
    rates = run(make(COSINE, 100, state=saved(first)), 100)
    assert rates[0] == pytest.approx(6 / 11)
    assert falls(rates)


def test_the_second_training_has_base_rates_of_its_own() -> None:
    first = make(COSINE, 110)
    run(first, 60)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    second = ContinuedSchedule(optimizer, COSINE, total_steps=50, state=saved(first))
    assert second.get_last_lr() == pytest.approx([3e-4 * 0.55])


def test_rates_in_tensors_are_kept_in_place() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))
    schedule = ContinuedSchedule(optimizer, COSINE, total_steps=110)
    place = optimizer.param_groups[0]["lr"]
    reference = make(COSINE, 110)
    run(reference, 60)
    state = saved(reference)
    schedule.load_state_dict(state | {"base_lrs": state["base_lrs"][:1]})
    assert optimizer.param_groups[0]["lr"] is place
    assert float(place) == pytest.approx(0.55)


def test_torchs_own_scheduler_can_load_the_state() -> None:
    schedule = make(COSINE, 110)
    run(schedule, 60)
    other = LambdaLR(schedule.optimizer, lambda step: 1.0)
    other.load_state_dict(saved(schedule))
    assert other.last_epoch == 60


def test_the_curve_survives_as_plain_values() -> None:
    curve = stretched(planned(COSINE, 110), COSINE, 60, 200)
    again = Curve.from_dict(curve.as_dict())
    assert again == curve
    assert again.end == 200


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup takes 10 steps, all of the 10 steps"):
        make(COSINE, 10)
    with pytest.raises(ValueError, match="number of training steps must be known, got -1"):
        make(COSINE, -1)
    with pytest.raises(ValueError, match="total_steps is 50, but the training ends at step 100"):
        make(LearningRate(total_steps=50), 100)
    schedule = make(COSINE, 110)
    with pytest.raises(ValueError, match="another scheduler's"):
        schedule.load_state_dict(LambdaLR(schedule.optimizer, lambda step: 1.0).state_dict())
    state = saved(schedule)
    with pytest.raises(ValueError, match="saved schedule has 1 parameter groups, the optimizer 2"):
        schedule.load_state_dict(state | {"base_lrs": [1.0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "step"}, "decay must be cosine, linear or constant, got 'step'"),
        ({"warmup": -1}, "warmup must be an optimizer step"),
        ({"warmup": 1.0}, "warmup must be an optimizer step"),
        ({"final": 1.5}, "final must be a share of the base rate"),
        ({"final": 0.1, "decay": "constant"}, "final has no effect"),
        ({"total_steps": 0}, "total_steps must be 1 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRate(**options)
