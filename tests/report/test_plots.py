"""The plots: how targets are arranged into a grid, and when there is nothing to draw."""

import io
import math

import pytest
from matplotlib.image import imread

from lightning_prune.report import plots as report_plots
from lightning_prune.report.plots import DARK, LIGHT, Grid, draw_heatmap, draw_history, draw_recovery, group_targets


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


def pixels(picture):
    """Return a picture as (rows, columns, 4) numbers in [0, 1], which only a whole PNG gives."""
    return imread(io.BytesIO(picture), format="png")


def lines(axes):
    """Return the points of the lines, with the label of each."""
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.get_lines()}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def target(name, num_zeros, num_weights=100):
    return {"name": name, "num_zeros": num_zeros, "num_weights": num_weights}


def test_layers_are_rows_and_kinds_are_columns():
    grid = group_targets(
        [
            target("model.layers.10.mlp.up_proj.weight", 70),
            target("model.layers.2.mlp.up_proj.weight", 50),
            target("model.layers.2.self_attn.q_proj.weight", 25),
        ]
    )
    assert grid == Grid(("2", "10"), ("mlp.up_proj", "self_attn.q_proj"), ((0.5, 0.25), (0.7, None)))


def test_experts_of_one_layer_share_a_cell():
    names = [f"model.layers.0.mlp.experts.{idx}.w1.weight" for idx in range(2)]
    grid = group_targets([target(names[0], 10, 100), target(names[1], 90, 300)])
    assert grid == Grid(("0",), ("mlp.experts.*.w1",), ((0.25,),))


def test_names_without_a_number_and_two_stacks():
    grid = group_targets(
        [target("encoder.layers.0.fc.weight", 1), target("decoder.layers.0.fc.weight", 2), target("head.weight", 3)]
    )
    assert grid.rows == ("-", "decoder.layers.0", "encoder.layers.0")
    assert grid.columns == ("fc", "head")
    assert grid.cells == ((None, 0.03), (0.02, None), (0.01, None))


def test_modules_of_a_plain_sequence():
    assert group_targets([target("0.weight", 50), target("2.weight", 25)]) == Grid(
        ("0", "2"), ("weight",), ((0.5,), (0.25,))
    )


@pytest.mark.parametrize("num_layers", [1, 80])
def test_heat_map_shows_every_layer_at_any_depth(num_layers, figures):
    grid = group_targets([target(f"layers.{idx}.fc.weight", idx) for idx in range(num_layers)])
    picture = pixels(draw_heatmap(grid))
    (figure,) = figures
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[idx / 100] for idx in range(num_layers)]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["fc"]
    every = 1 if num_layers == 1 else 2
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        str(idx) for idx in range(0, num_layers, every)
    ]
    assert texts(figure.axes[0]) == (["0.0"] if num_layers == 1 else [])
    assert picture.shape[:2] == tuple(round(160 * inches) for inches in figure.get_size_inches()[::-1])


def test_heat_map_leaves_what_is_no_target_empty_and_its_colours_span_whole_tens(figures):
    grid = Grid(("0", "1"), ("q", "k"), ((0.31, None), (0.78, 0.5)))
    pixels(draw_heatmap(grid, DARK))
    (figure,) = figures
    (image,) = figure.axes[0].images
    assert image.get_clim() == pytest.approx((0.3, 0.8))
    assert math.isnan(image.get_array().filled(math.nan)[0, 1])
    assert texts(figure.axes[0]) == ["31.0", "78.0", "50.0"]
    colours = [text.get_color() for text in figure.axes[0].texts]
    assert colours == [DARK.text, DARK.surface, DARK.text]  # the strongest cell is written on in the other colour


def test_nothing_to_draw():
    assert draw_heatmap(group_targets([])) is None
    assert draw_history([]) is None
    assert draw_history([{"step": 1, "loss": 2.0}]) is None
    assert draw_history([{"step": 1, "grad_norm": 2.0}, {"step": 2, "grad_norm": 2.0}]) is None


def test_history_draws_sparsity_above_every_loss_and_leaves_out_what_is_not_finite(figures):
    history = [
        {"step": 1, "loss": 2.0, "sparsity": 0.1, "grad_norm": 3.0},
        {"step": 2, "loss": float("nan"), "eval_loss": 2.5, "sparsity": 0.2},
        {"step": 4, "loss": 1.5, "eval_loss": 2.25},
    ]
    pixels(draw_history(history))
    above, below = figures[0].axes
    assert list(lines(above).values()) == [[(1, 0.1), (2, 0.2)]]
    assert above.get_lines()[0].get_drawstyle() == "steps-post"  # a mask holds until the next update
    assert lines(below) == {"loss": [(1, 2.0), (4, 1.5)], "eval_loss": [(2, 2.5), (4, 2.25)]}
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["loss", "eval_loss"]
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "optimizer step")


def test_one_of_two_panels_is_enough(figures):
    pixels(draw_history([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 2.0}]))
    pixels(draw_history([{"step": 1, "sparsity": 0.1}, {"step": 2, "sparsity": 0.2}]))
    (loss,), (sparsity,) = (figure.axes for figure in figures)
    assert lines(loss) == {"loss": [(1, 2.0), (2, 1.5)]}
    assert loss.get_legend() is None
    assert list(lines(sparsity).values()) == [[(1, 0.1), (2, 0.2)]]


def test_themes_differ_in_what_they_are_drawn_on():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    corners = [pixels(draw_history(history, theme))[0, 0, :3].tolist() for theme in (LIGHT, DARK)]
    wanted = [[int(theme.surface[start : start + 2], 16) / 255 for start in (1, 3, 5)] for theme in (LIGHT, DARK)]
    assert corners == [pytest.approx(colour, abs=1e-3) for colour in wanted]


def test_drawing_leaves_pyplot_alone():
    from matplotlib import pyplot

    before, own = pyplot.get_backend(), pyplot.figure()
    try:
        draw_history([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
        assert (pyplot.get_backend(), pyplot.get_fignums(), pyplot.gcf()) == (before, [own.number], own)
    finally:
        pyplot.close(own)


def gap(task, before, pruned, recovered, share):
    return {"task": task, "metric": "m", "before": before, "pruned": pruned, "recovered": recovered, "share": share}


def test_recovery_is_drawn_from_a_loss_measured_twice_or_a_share(figures):
    pixels(draw_recovery([gap("", 1.5, 2.5, 1.75, 0.75), gap("$x$", 0.6, 0.5, 0.1, -4.0)]))
    pixels(draw_recovery([gap("", None, 2.5, 1.75, None)]))
    pixels(draw_recovery([gap("t", 0.6, 0.5, 0.7, 2.0)]))
    both, loss_alone, share_alone = figures
    moments, shares = both.axes
    dense, course = moments.get_lines()
    assert set(dense.get_ydata()) == {1.5}  # a line across at the level of the dense model
    assert list(zip(*course.get_data(), strict=True)) == [(0, 1.5), (1, 2.5), (2, 1.75)]
    assert texts(moments) == ["1.5", "2.5", "1.75"]
    assert [label.get_text() for label in shares.get_yticklabels()] == ["loss", "$x$: m"]
    assert [bar.get_width() for bar in shares.patches] == [1.0, 1.0, 0.75, -0.25]  # drawn to -25 %, said in full
    assert texts(shares) == ["75%", "-400%"]
    (axes,) = loss_alone.axes
    (course,) = axes.get_lines()
    assert list(course.get_ydata()) == [2.5, 1.75]
    (axes,) = share_alone.axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.25]
    assert texts(axes) == ["200%"]
    assert draw_recovery([gap("", None, float("inf"), 1.75, None), gap("t", None, 0.5, 0.7, None)]) is None
    assert draw_recovery([]) is None
