"""Schedules: values from the formulas by hand, and one step before, at and after both ends."""

import math

import pytest

from lightning_prune import Cosine, Cubic, Geometric, Linear, Once
from lightning_prune.schedules import Ramp, moment_to_step

RAMPS = [Linear, Cubic, Cosine, Geometric]
TOTAL = 100


def ramp(kind: type[Ramp], **changes: float) -> Ramp:
    """Return a ramp from 0.2 to 0.8 between steps 10 and 50, every 20 steps."""
    return kind(**{"sparsity": 0.8, "initial": 0.2, "start": 10, "end": 50, "interval": 20} | changes)


@pytest.mark.parametrize("kind", RAMPS)
def test_one_step_before_at_and_after_both_ends(kind: type[Ramp]) -> None:
    schedule = ramp(kind)
    values = [schedule.sparsity_at(step, TOTAL) for step in (0, 9, 10, 11, 49, 50, 51, 100)]
    assert values[:2] == [0.0, 0.0]
    assert values[2] == pytest.approx(0.2, abs=1e-12)
    assert 0.2 < values[3] < values[4] < 0.8
    assert values[5:] == [0.8, 0.8, 0.8]


@pytest.mark.parametrize("kind", RAMPS)
def test_masks_change_every_interval_and_at_both_ends(kind: type[Ramp]) -> None:
    schedule = ramp(kind, interval=15)
    assert [step for step in range(TOTAL + 1) if schedule.is_due(step, TOTAL)] == [10, 25, 40, 50]
    assert schedule.resolve(TOTAL) == (10, 50, 15)


@pytest.mark.parametrize("kind", RAMPS)
def test_ramps_only_rise(kind: type[Ramp]) -> None:
    values = [ramp(kind).sparsity_at(step, TOTAL) for step in range(TOTAL + 1)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("kind", "quarter", "half"),
    [
        (Linear, 0.35, 0.5),
        (Cubic, 0.8 - 0.6 * 0.75**3, 0.8 - 0.6 / 8),  # half-way 87.5 % of the rise is done
        (Cosine, 0.2 + 0.3 * (1 - math.sqrt(0.5)), 0.5),
        (Geometric, 1 - 0.8**0.75 * 0.2**0.25, 1 - math.sqrt(0.8 * 0.2)),
    ],
)
def test_values_on_the_way(kind: type[Ramp], quarter: float, half: float) -> None:
    assert ramp(kind).sparsity_at(20, TOTAL) == pytest.approx(quarter, rel=1e-12)
    assert ramp(kind).sparsity_at(30, TOTAL) == pytest.approx(half, rel=1e-12)


def test_cubic_leaves_three_quarters_of_the_rise_on_average() -> None:
    schedule = Cubic(sparsity=0.9, start=0, end=10_000, interval=1)
    mean = sum(schedule.sparsity_at(step, 10_000) for step in range(10_000)) / 10_000
    assert mean == pytest.approx(0.75 * 0.9, abs=1e-4)


def test_geometric_keeps_the_same_share_every_time() -> None:
    schedule = Geometric(sparsity=0.9375, start=0, end=40, interval=10)
    densities = [1 - schedule.sparsity_at(step, 40) for step in (0, 10, 20, 30, 40)]
    assert densities == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])


def test_fractions_are_of_all_steps() -> None:
    schedule = Cubic(sparsity=0.5, start=0.1, end=0.75, interval=0.05)
    assert schedule.resolve(200) == (20, 150, 10)
    assert schedule.resolve(7) == (1, 5, 1)  # an interval of less than a step is a step
    assert Linear(sparsity=0.5).resolve(1000) == (0, 750, 10)
    assert [moment_to_step(moment, 80) for moment in (1, 1.0, 0.5, 0)] == [1, 80, 40, 0]


def test_a_whole_number_is_a_step_and_a_number_with_a_point_a_fraction() -> None:
    assert Linear(sparsity=0.5, start=1, end=1.0).resolve(30)[:2] == (1, 30)


def test_once_prunes_at_one_moment_and_holds() -> None:
    schedule = Once(sparsity=0.6, at=5)
    assert [schedule.sparsity_at(step, 10) for step in (4, 5, 6, 10)] == [0.0, 0.6, 0.6, 0.6]
    assert [step for step in range(11) if schedule.is_due(step, 10)] == [5]
    assert schedule.resolve(10) == (5, 5, 1)
    assert Once(sparsity=0.6, at=0.5).resolve(10) == (5, 5, 1)
    assert Once(sparsity=0.6).is_due(0, 10)


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, math.nan])
def test_sparsity_outside_zero_to_one_is_refused(value: float) -> None:
    for kind in (*RAMPS, Once):
        with pytest.raises(ValueError, match=rf"sparsity must be in \[0, 1\), got {value}; to remove a layer"):
            kind(sparsity=value)
    with pytest.raises(ValueError, match=r"initial must be in \[0, 1\)"):
        Linear(sparsity=0.5, initial=value)


@pytest.mark.parametrize("moment", [-1, -0.1, 1.5, math.nan])
@pytest.mark.parametrize("field", ["start", "end", "interval"])
def test_moments_outside_the_training_are_refused(field: str, moment: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be an optimizer step .* or a fraction .*got {moment}"):
        Linear(sparsity=0.5, **{field: moment})
    with pytest.raises(ValueError, match=f"at must be an optimizer step .*got {moment}"):
        Once(sparsity=0.5, at=moment)


def test_schedules_that_prune_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="sparsity is 0, which prunes nothing; give a value above 0"):
        Once(sparsity=0)
    with pytest.raises(ValueError, match=r"sparsity must be above initial, got 0\.3 and 0\.3"):
        Cubic(sparsity=0.3, initial=0.3)
    with pytest.raises(ValueError, match="interval must be above 0"):
        Cubic(sparsity=0.3, interval=0)


def test_a_start_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="start must come before end, got 50 and 50; use Once for one moment"):
        Linear(sparsity=0.5, start=50, end=50)
    with pytest.raises(ValueError, match=r"start must come before end, got 0\.5 and 0\.2"):
        Linear(sparsity=0.5, start=0.5, end=0.2)
    with pytest.raises(ValueError, match=r"schedule\.start is step 90 and schedule\.end step 75 of 100; start must"):
        Linear(sparsity=0.5, start=90, end=0.75).resolve(100)


def test_an_end_beyond_the_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.end is step 101, beyond the 100 steps.*0\.5 would never be"):
        Linear(sparsity=0.5, end=101, start=0).resolve(100)
    with pytest.raises(ValueError, match=r"schedule\.at is step 101, beyond the 100 steps of this training; lower it"):
        Once(sparsity=0.5, at=101).resolve(100)
    assert Linear(sparsity=0.5, end=100, start=0).resolve(100)[1] == 100
    assert Once(sparsity=0.5, at=100).resolve(100)[1] == 100
