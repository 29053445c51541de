"""The plots: how targets are arranged into a grid, and when there is nothing to draw."""

import pytest

from lightning_prune.report_plots import Grid, draw_heatmap, draw_history, draw_recovery, group_targets

PNG = b"\x89PNG\r\n\x1a\n"


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
def test_heat_map_is_drawn_at_any_depth(num_layers):
    grid = group_targets([target(f"layers.{idx}.fc.weight", idx) for idx in range(num_layers)])
    assert draw_heatmap(grid).startswith(PNG)


def test_nothing_to_draw():
    assert draw_heatmap(group_targets([])) is None
    assert draw_history([]) is None
    assert draw_history([{"step": 1, "loss": 2.0}]) is None
    assert draw_history([{"step": 1, "grad_norm": 2.0}, {"step": 2, "grad_norm": 2.0}]) is None


def test_one_of_two_panels_is_enough():
    assert draw_history([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 2.0}]).startswith(PNG)
    assert draw_history([{"step": 1, "sparsity": 0.1}, {"step": 2, "sparsity": 0.2}]).startswith(PNG)


def test_drawing_leaves_pyplot_alone():
    import sys

    draw_history([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def gap(task, before, pruned, recovered, share):
    return {"task": task, "metric": "m", "before": before, "pruned": pruned, "recovered": recovered, "share": share}


def test_recovery_is_drawn_from_a_loss_measured_twice_or_a_share():
    assert draw_recovery([gap("", 1.5, 2.5, 1.75, 0.75), gap("$x$", 0.6, 0.5, 0.1, -4.0)]).startswith(PNG)
    assert draw_recovery([gap("", None, 2.5, 1.75, None)]).startswith(PNG)
    assert draw_recovery([gap("t", 0.6, 0.5, 0.7, 2.0)]).startswith(PNG)
    assert draw_recovery([gap("", None, float("inf"), 1.75, None), gap("t", None, 0.5, 0.7, None)]) is None
    assert draw_recovery([]) is None
