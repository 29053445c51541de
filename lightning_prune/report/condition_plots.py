"""Draw the plots of a conditioned training.

Which instructions share units, what the guard measured, quality against activated parameters, and what serving takes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_prune.report import plots as report_plots
from lightning_prune.report.plots import LIGHT, Grid, Theme, check_requirements, draw_heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PARTS",
    "alike_first",
    "draw_first_token",
    "draw_guard",
    "draw_overlap_by_block",
    "draw_overlaps",
    "draw_quality",
]

Values = Mapping[str, object]
PARTS = ("predicting", "gathering", "prefill")  # of the time to the first token, in their order
_MAX_MOMENTS = 12  # columns of the heat map of blocks
_PANELS = (
    ("Units that two instructions share", (("overlap", "overlap"),)),
    ("Spread of scores, across instructions over across units", (("score_spread", "spread"),)),
    ("Cost of another instruction's mask, nats per token", (("swap_cost", "swap cost"),)),
    ("Loss, nats per token", (("own_loss", "own units"), ("swapped_loss", "swapped"), ("whole_loss", "all units"))),
)


def alike_first(between: Sequence[Sequence[float]]) -> list[int]:
    """Return an order of instructions in which each is followed by the one, of those left, that is most alike."""
    order = [0] if between else []
    while len(order) < len(between):
        row = between[order[-1]]
        order.append(max((idx for idx in range(len(between)) if idx not in order), key=lambda idx: row[idx]))
    return order


def draw_overlaps(labels: Sequence[str], between: Sequence[Sequence[float]], theme: Theme = LIGHT) -> bytes | None:
    """Draw how many units every two instructions or tasks share.

    Args:
        labels: of the rows, which are the columns too.
        between: Jaccard index of each pair, in [0, 1].
        theme: the colours.

    Returns:
        a PNG, or None if there are no two rows.
    """
    if len(labels) < 2:
        return None
    order = alike_first(between)
    cells = tuple(tuple(None if row == column else between[row][column] for column in order) for row in order)
    names = tuple(labels[row] for row in order)
    return draw_heatmap(Grid(names, names, cells), theme, rows="instruction")


def draw_overlap_by_block(blocks: Sequence[str], measurements: Sequence[Values], theme: Theme = LIGHT) -> bytes | None:
    """Draw how many units two instructions share in each block, as training goes on.

    Args:
        blocks: their names.
        measurements: entries with `step` and `by_group`, one overlap for each block; of many, a dozen are drawn.
        theme: the colours.

    Returns:
        a PNG, or None if nothing was measured.
    """
    found = [entry for entry in measurements if isinstance(entry.get("by_group"), list | tuple)]
    if not found or not blocks:
        return None
    every = math.ceil(len(found) / _MAX_MOMENTS)
    shown = found[::-1][::every][::-1]  # the last one among them
    columns: list[Any] = [entry["by_group"] for entry in shown]
    cells = tuple(tuple(column[row] for column in columns) for row in range(len(blocks)))
    return draw_heatmap(
        Grid(tuple(blocks), tuple(f"step {entry['step']}" for entry in shown), cells), theme, rows="block"
    )


def draw_guard(measurements: Sequence[Values], theme: Theme = LIGHT) -> bytes | None:
    """Draw what the guard measured over optimizer steps, one panel for each quantity.

    Args:
        measurements: entries with `step` and any of `overlap`, `score_spread`, `swap_cost`, and the losses `own_loss`,
            `swapped_loss` and `whole_loss`.
        theme: the colours.

    Returns:
        a PNG, or None if nothing was measured.
    """
    panels = []
    for title, curves in _PANELS:
        points = {label: report_plots.points_of(measurements, key) for key, label in curves}
        if any(steps for steps, _ in points.values()):
            panels.append((title, points))
    if not panels:
        return None
    check_requirements()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    num_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9, 0.6 + 2.3 * num_rows), layout="constrained")
    axes_all = list(figure.subplots(num_rows, 2, squeeze=False).flat)
    for axes, (title, points) in zip(axes_all, panels, strict=False):
        _draw_curves(axes, title, points, theme)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimizer step", fontsize=9, color=theme.muted)
    if panels[0][0] == _PANELS[0][0]:
        axes_all[0].yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes_all[0].set_ylim(0, 1.02)
    for axes in axes_all[len(panels) :]:
        axes.set_visible(False)
    return report_plots.png(figure, theme)


def _draw_curves(axes: "Axes", title: str, points: Mapping[str, tuple[list[float], list[float]]], theme: Theme) -> None:
    report_plots.style(axes, theme)
    for idx, (label, (steps, values)) in enumerate(points.items()):
        marker = "o" if len(steps) <= 30 else None
        color = theme.lines[idx % len(theme.lines)]
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)
    axes.set_title(title, loc="left", fontsize=10, color=theme.text)
    if len(points) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=theme.text)


def draw_first_token(first_token: Mapping[str, float], theme: Theme = LIGHT) -> bytes | None:
    """Draw the time to the first token, split into its parts, above that of the whole model.

    Args:
        first_token: seconds of each of `PARTS`, and `whole_prefill`, that of the model with all units.
        theme: the colours.

    Returns:
        a PNG, or None if a part was not measured.
    """
    if any(part not in first_token for part in PARTS):
        return None
    check_requirements()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    report_plots.style(axes, theme)
    axes.grid(visible=False)
    left = 0.0
    for part, color in zip(PARTS, theme.lines, strict=False):
        width = 1e3 * first_token[part]
        axes.barh(0, width, left=left, color=color, height=0.5, label=f"{part} {width:.3g} ms")
        left += width
    rows = ["selected units"]
    if "whole_prefill" in first_token:
        whole = 1e3 * first_token["whole_prefill"]
        axes.barh(1, whole, color=theme.muted, height=0.5, label=f"prefill of all units {whole:.3g} ms")
        rows.append("all units")
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels(rows)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds to the first token", fontsize=9, color=theme.muted)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9, labelcolor=theme.text)
    return report_plots.png(figure, theme)


def draw_quality(rows: Sequence[Values], theme: Theme = LIGHT) -> bytes | None:
    """Draw the loss of several kinds of models against how many parameters each activates.

    Args:
        rows: entries with `arm`, the kind (dense, static, conditioned); `num_activated`, parameters for one token; and
            `loss`, nats per token.
        theme: the colours.

    Returns:
        a PNG, or None if there are no rows.
    """
    arms: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        arms.setdefault(str(row["arm"]), []).append((float(str(row["num_activated"])), float(str(row["loss"]))))
    if not arms:
        return None
    check_requirements()
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    report_plots.style(axes, theme)
    num_colors = len(theme.lines)
    for idx, (arm, found) in enumerate(arms.items()):
        xs, ys = zip(*sorted(found), strict=True)
        (line,) = axes.plot(xs, ys, linewidth=1.6, marker="osD^vPX"[idx % 7], markersize=6, label=arm)
        line.set_color(theme.lines[idx % num_colors])
        line.set_linestyle(("-", "--", ":")[idx // num_colors % 3])
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("activated parameters", fontsize=9, color=theme.muted)
    axes.set_title("Loss, nats per token", loc="left", fontsize=10, color=theme.text)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=theme.text)
    return report_plots.png(figure, theme)
