"""How numbers are written."""

import pytest

from lightning_prune.report.tables import before_after, format_count, format_percent, format_value


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (1000, "", "1.00 k"),
        (12345, "", "12.3 k"),
        (999_499, "", "999 k"),
        (999_600, "", "1.00 M"),
        (9_999_000, "", "10.0 M"),
        (6_296_448, "B", "6.30 MB"),
        (512, "B", "512 B"),
        (1_300_000_000, "", "1.30 G"),
        (2.5e15, "", "2500 T"),
    ],
)
def test_counts(value, unit, text):
    assert format_count(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.58964, "5.590"),
        (0.25, "0.2500"),
        (0, "0.0000"),
        (-12.3456, "-12.35"),
        (124852.3, "124,852"),
        (0.00012346, "1.235e-04"),
        (float("inf"), "inf"),
        (None, "-"),
        ("acc", "-"),
        (True, "-"),
    ],
)
def test_values(value, text):
    assert format_value(value) == text


def test_percent():
    assert format_percent(0.50004) == "50.00 %"
    assert format_percent(None) == "-"


def test_counts_stand_before_and_after():
    report = {"num_parameters": 2000, "num_nonzeros": 500}
    assert "<td>2.00 k</td><td>500</td>" in before_after(report, [])
