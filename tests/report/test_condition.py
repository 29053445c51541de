"""The sections of a conditioned training: what the page says, what it leaves out, and what the plots are drawn from."""

import json

import pytest

from lightning_prune.report import plots as report_plots
from lightning_prune.report.condition_plots import (
    alike_first,
    draw_first_token,
    draw_guard,
    draw_overlap_by_block,
    draw_overlaps,
    draw_quality,
)
from lightning_prune.report.plots import DARK, LIGHT
from tests.report.test_page import EVALUATIONS, HISTORY, recovery_report, write

MEASUREMENTS = [
    {"step": 10, "overlap": 0.9, "score_spread": 0.1, "swap_cost": 0.0, "by_group": [0.8, 1.0]},
    {
        "step": 20,
        "overlap": 0.3,
        "score_spread": 0.5,
        "swap_cost": 0.25,
        "own_loss": 2.5,
        "swapped_loss": 2.75,
        "whole_loss": 2.0,
        "by_group": [0.2, 0.4],
    },
]
BETWEEN = [[1.0, 0.2, 0.6], [0.2, 1.0, 0.3], [0.6, 0.3, 1.0]]
CONDITION = {
    "method": "Instruction",
    "num_parameters": 4000,
    "num_activated": 1000,
    "num_added": 77,
    "groups": [
        {"name": "layers.0.mlp", "num_units": 12, "keep": 4, "always": 2, "ever": 9},
        {"name": "layers.1.mlp", "num_units": 12, "keep": 3, "always": 0, "ever": 12},
    ],
    "measurements": MEASUREMENTS,
    "instructions": ["translate", "<b>sum</b>", "import os"],
    "between": BETWEEN,
    "first_token": {
        "predicting": 0.001,
        "gathering": 0.002,
        "prefill": 0.003,
        "whole_prefill": 0.009,
        "num_tokens": 32,
    },
    "quality": [
        {"arm": "dense small", "num_activated": 1000, "loss": 3.0},
        {"arm": "conditioned", "num_activated": 1000, "loss": 2.5},
    ],
}


@pytest.fixture
def figures(monkeypatch):
    """Collect every figure at the moment it becomes a picture."""
    found = []
    finish = report_plots.png

    def keep(figure, theme):
        found.append(figure)
        return finish(figure, theme)

    monkeypatch.setattr(report_plots, "png", keep)
    return found


def curves(axes):
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.get_lines()}


def test_the_page_shows_units_losses_and_times(tmp_path):
    page = write(tmp_path, condition=CONDITION)
    assert page.row("layers.0.mlp") == ["12", "4", "33.33 %", "2", "9"]
    assert page.row("layers.1.mlp") == ["12", "3", "25.00 %", "0", "12"]
    assert page.row("Units of its own instruction") == ["2.500", ""]
    assert page.row("Units of another instruction") == ["2.750", "+0.250"]
    assert page.row("All units") == ["2.000", "-0.500"]
    assert page.row("conditioned") == ["1.00 k", "2.500", "+0.000"]
    assert page.row("dense small") == ["1.00 k", "3.000", "+0.500"]
    assert "1,000 of 4,000 parameters (25.00 %) compute for one instruction." in page.text
    assert "Instruction added 77 parameters." in page.text
    assert "<b>sum</b>" in page.text  # as text
    said = " ".join(page.alts)
    assert "from 20.00 %, instructions 1 and 2, to 60.00 %, instructions 1 and 3" in said
    assert "At step 20: layers.0.mlp 20.00 %, layers.1.mlp 40.00 %." in said
    assert "overlap from 0.9000 to 0.3000; spread from 0.1000 to 0.5000; cost of a swap from 0.0000 to 0.2500" in said
    assert "6 ms in all (predicting 1 ms, gathering 2 ms, prefill 3 ms); prefill of all units 9 ms" in said
    assert "dense small 3.000 with 1.00 k; conditioned 2.500 with 1.00 k" in said
    assert json.loads((tmp_path / "report.json").read_text())["condition"] == CONDITION


def test_the_page_does_not_speak_of_what_was_not_pruned(tmp_path):
    page = write(tmp_path, condition=CONDITION, evaluations=EVALUATIONS[1:], recovery=recovery_report())
    for word in ("Sparsity", "pruning,", "Recovery", "Non-zero", "Targets", "weights are zero"):
        assert word not in page.text
    assert page.row("after")[0] == "600"
    assert "Conditioning report" in page.text
    assert "Conditioning report" not in write(tmp_path).text


def test_a_condition_without_measurements_has_no_empty_sections(tmp_path):
    page = write(tmp_path, condition={"method": "SkipLayer", "num_added": 5, "measurements": []}, evaluations=[])
    assert "SkipLayer added 5 parameters." in page.text
    assert len(page.alts) == 1  # the loss
    assert "Loss over time" not in write(tmp_path, condition=CONDITION, history=[]).text
    for title in ("Units that", "Does the choice", "Time to the first token", "Quality", "Evaluations"):
        assert title not in page.text
    said = write(tmp_path, condition={"first_token": {"note": "the model is sharded"}}, history=HISTORY)
    assert "Not measured: the model is sharded" in said.text


def test_rows_of_the_matrix_follow_what_is_most_alike(figures):
    assert alike_first(BETWEEN) == [0, 2, 1]
    assert alike_first([]) == []
    assert draw_overlaps(["one"], [[1.0]]) is None
    draw_overlaps(["a", "b", "c"], BETWEEN)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    assert [text.get_text() for text in axes.texts] == ["60.0", "20.0", "60.0", "30.0", "20.0", "30.0"]
    assert axes.get_ylabel() == "instruction"


def test_blocks_are_drawn_over_a_dozen_steps_with_the_last(figures):
    many = [{"step": step, "by_group": [step / 100, 0.5]} for step in range(1, 31)]
    draw_overlap_by_block(["x", "y"], many)
    axes = figures[0].axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == 10
    assert labels[-1] == "step 30"
    assert axes.get_ylabel() == "block"
    assert axes.get_images()[0].get_array()[0, -1] == pytest.approx(0.3)
    assert draw_overlap_by_block(["x"], [{"step": 1}]) is None


def test_the_guards_measurements_have_a_panel_each(figures):
    draw_guard(MEASUREMENTS)
    overlap, spread, cost, loss = figures[0].axes
    assert curves(overlap) == {"overlap": [(10, 0.9), (20, 0.3)]}
    assert curves(spread) == {"spread": [(10, 0.1), (20, 0.5)]}
    assert curves(cost) == {"swap cost": [(10, 0.0), (20, 0.25)]}
    assert curves(loss) == {"own units": [(20, 2.5)], "swapped": [(20, 2.75)], "all units": [(20, 2.0)]}
    assert draw_guard([]) is None
    assert draw_guard(MEASUREMENTS, DARK) != draw_guard(MEASUREMENTS, LIGHT)


def test_parts_of_the_first_token_are_stacked_above_the_whole_model(figures):
    draw_first_token(CONDITION["first_token"])
    bars = [(bar.get_x(), bar.get_width(), round(bar.get_y())) for bar in figures[0].axes[0].patches]
    assert bars == [
        (0.0, pytest.approx(1.0), 0),
        (pytest.approx(1.0), pytest.approx(2.0), 0),
        (pytest.approx(3.0), pytest.approx(3.0), 0),
        (0.0, pytest.approx(9.0), 1),
    ]
    assert draw_first_token({"predicting": 1.0}) is None


def test_quality_is_a_line_for_each_arm(figures):
    rows = [*CONDITION["quality"], {"arm": "conditioned", "num_activated": 500, "loss": 2.9}]
    draw_quality(rows)
    found = curves(figures[0].axes[0])
    assert found == {"dense small": [(1000, 3.0)], "conditioned": [(500, 2.9), (1000, 2.5)]}
    draw_quality([{"arm": f"arm {number}", "num_activated": 1000, "loss": 1.0 + number} for number in range(9)])
    looks = {(line.get_color(), line.get_linestyle()) for line in figures[1].axes[0].get_lines()}
    assert len(looks) == 9  # told apart also where the colours are used up
    assert draw_quality([]) is None
