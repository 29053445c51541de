"""Draw the plots of the report: sparsity and loss over time, the sparsity of every target by layer, and recovery.

matplotlib is imported inside the functions: it belongs to the extra `report`. Figures are drawn without pyplot, so the
caller's backend, styles and open figures stay as they are.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "Grid",
    "Theme",
    "check_requirements",
    "draw_heatmap",
    "draw_history",
    "draw_recovery",
    "group_targets",
    "png",
    "points_of",
    "style",
]

_MAX_LABELLED_CELLS = 600
_MOMENTS = {"before": "before\npruning", "pruned": "right after\npruning", "recovered": "after\nrecovery"}


@dataclass(frozen=True)
class Theme:
    """Colours of one plot, as #rrggbb; `lines` are used in turn."""

    surface: str
    text: str
    muted: str
    rule: str
    heat: tuple[str, str, str]
    lines: tuple[str, ...]


LIGHT = Theme(
    surface="#ffffff",
    text="#1c2330",
    muted="#5d6778",
    rule="#e3e7ee",
    heat=("#f3f6fd", "#8fa9ee", "#23409c"),
    lines=("#2f55d4", "#c2571a", "#12806a", "#8b3fb5"),
)
DARK = Theme(
    surface="#171c26",
    text="#e8ecf3",
    muted="#9aa5b8",
    rule="#2c3444",
    heat=("#1d2433", "#3d5fc4", "#b6c8ff"),
    lines=("#86a3ff", "#f0a06a", "#5fd0b5", "#cf98f0"),
)


@dataclass(frozen=True)
class Grid:
    """Sparsity by layer (rows) and kind of target (columns); None where a layer has no such target."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]


def check_requirements() -> None:
    """Import matplotlib, so that its absence is known before training and not after it.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('writing plots needs matplotlib: pip install "lightning_prune[report]"') from error


def _layer_and_kind(name: str) -> tuple[tuple[str, int], str]:
    """Split a clean parameter name at its first number: ("model.layers", 3) and "mlp.up_proj"."""
    match = re.match(r"(?:(?P<prefix>.*?)\.)?(?P<number>\d+)\.(?P<kind>.+)", name)
    if match is None:
        return ("", -1), name.removesuffix(".weight")
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", match["kind"])
    return (match["prefix"] or "", int(match["number"])), kind.removesuffix(".weight")


def _ratio(count: tuple[int, int] | None) -> float | None:
    """Return zeros over weights; None where nothing was counted."""
    return count[0] / count[1] if count and count[1] else None


def group_targets(targets: Sequence[Mapping[str, object]]) -> Grid:
    """Arrange targets by the first number in their names, which is the layer, and by what follows it.

    Targets that agree in both, such as the experts of one layer, share a cell: zeros over weights of all of them.
    """
    counts: dict[tuple[tuple[str, int], str], tuple[int, int]] = {}
    for target in targets:
        key = _layer_and_kind(str(target["name"]))
        zeros, weights = counts.get(key, (0, 0))
        counts[key] = (zeros + int(str(target["num_zeros"])), weights + int(str(target["num_weights"])))
    layers = sorted({layer for layer, _ in counts})
    kinds = list(dict.fromkeys(kind for _, kind in counts))
    several = len({prefix for prefix, number in layers if number >= 0}) > 1
    labels = []
    for prefix, number in layers:
        label = "-" if number < 0 else str(number)
        labels.append(f"{prefix}.{label}" if several and prefix else label)
    cells = tuple(tuple(_ratio(counts.get((layer, kind))) for kind in kinds) for layer in layers)
    return Grid(tuple(labels), tuple(kinds), cells)


def points_of(history: Sequence[Mapping[str, object]], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one metric, values that are not finite left out."""
    pairs = [
        (float(str(entry["step"])), float(value))
        for entry in history
        if isinstance(value := entry.get(key), int | float) and math.isfinite(value)
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def style(axes: "Axes", theme: Theme) -> None:
    """Give axes the look of all plots."""
    axes.set_facecolor(theme.surface)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.rule)


def png(figure: "Figure", theme: Theme) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=theme.surface)
    return buffer.getvalue()


def draw_history(history: Sequence[Mapping[str, object]], theme: Theme = LIGHT) -> bytes | None:
    """Draw sparsity above loss over optimizer steps.

    Args:
        history: entries with `step` and any of `sparsity` and metrics; those whose name ends in "loss" are drawn.
        theme: the colours.

    Returns:
        a PNG, or None if neither has two points to join.
    """
    sparsity = points_of(history, "sparsity")
    names = sorted({key for entry in history for key in entry if key.endswith("loss")}, key=lambda key: (len(key), key))
    losses = {name: points for name in names if len((points := points_of(history, name))[0]) > 1}
    panels = [name for name, wanted in (("sparsity", len(sparsity[0]) > 1), ("loss", bool(losses))) if wanted]
    if not panels:
        return None
    check_requirements()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 0.9 + 2.1 * len(panels)), layout=ConstrainedLayoutEngine(h_pad=0.12))
    axes_of = dict(zip(panels, figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], strict=True))
    if "sparsity" in axes_of:
        axes = axes_of["sparsity"]
        axes.plot(*sparsity, color=theme.lines[0], linewidth=2, drawstyle="steps-post")
        axes.fill_between(*sparsity, step="post", color=theme.lines[0], alpha=0.12, linewidth=0)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
        axes.set_ylim(0, max(0.05, 1.08 * max(sparsity[1])))
        axes.set_title("Sparsity of the targets", loc="left", fontsize=10, color=theme.text)
    if "loss" in axes_of:
        axes = axes_of["loss"]
        for idx, (name, points) in enumerate(losses.items()):
            color = theme.lines[(idx + 1) % len(theme.lines)]
            marker = "o" if len(points[0]) <= 30 else None
            axes.plot(*points, color=color, linewidth=1.6, marker=marker, markersize=3.5, label=name)
        axes.set_title("Loss", loc="left", fontsize=10, color=theme.text)
        if len(losses) > 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=theme.text)
    for axes in axes_of.values():
        style(axes, theme)
    bottom = axes_of[panels[-1]]
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("optimizer step", fontsize=9, color=theme.muted)
    return png(figure, theme)


def _label_cells(axes: "Axes", grid: Grid, low: float, high: float, theme: Theme) -> None:
    """Write the percentage into every cell, in the colour that stands out against it."""
    for row_idx, row in enumerate(grid.cells):
        for column_idx, value in enumerate(row):
            if value is not None:
                is_strong = (value - low) / (high - low) > 0.6
                color = theme.surface if is_strong else theme.text
                axes.text(column_idx, row_idx, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=color)


def _draw_bar(figure: "Figure", image: Any, axes: "Axes", shrink: float, step: float, theme: Theme) -> None:
    """Draw the scale of colours beside the heat map."""
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, shrink=min(1.0, shrink), aspect=25, anchor=(0, 1))
    bar.ax.yaxis.set_major_locator(MultipleLocator(step))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)
    bar.outline.set_visible(False)


def draw_heatmap(grid: Grid, theme: Theme = LIGHT, *, rows: str = "layer") -> bytes | None:
    """Draw a share, as the sparsity of every layer and kind of target.

    Args:
        grid: the values; its colours span whole tens of percent, so that equal sparsities look equal.
        theme: the colours.
        rows: what a row is.

    Returns:
        a PNG, or None if there are no targets.
    """
    values = [value for row in grid.cells for value in row if value is not None]
    if not values:
        return None
    check_requirements()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values)) / 10
    if high - low < 0.2:
        low, high = max(0.0, low - 0.1), min(1.0, high + 0.1)
    height = 1.3 + min(16.0, 0.34 * len(grid.rows))
    width = min(16.0, max(5.0, 2.0 + 1.05 * len(grid.columns)))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    numbers = [[math.nan if value is None else value for value in row] for row in grid.cells]
    cmap = LinearSegmentedColormap.from_list("heat", theme.heat)
    image = axes.imshow(numbers, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    style(axes, theme)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([idx + 0.5 for idx in range(len(grid.columns) - 1)], minor=True)
    axes.set_yticks([idx + 0.5 for idx in range(len(grid.rows) - 1)], minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(which="minor", color=theme.surface, linewidth=1.5)
    axes.set_axisbelow(False)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(len(grid.columns)))
    axes.set_xticklabels(grid.columns, rotation=30, ha="right", rotation_mode="anchor", parse_math=False)
    every = max(1, math.ceil(len(grid.rows) / 48))
    axes.set_yticks(range(0, len(grid.rows), every))
    axes.set_yticklabels(grid.rows[::every], parse_math=False)
    axes.set_ylabel(rows, fontsize=9, color=theme.muted)
    if len(values) <= _MAX_LABELLED_CELLS and len(grid.rows) <= 48:
        _label_cells(axes, grid, low, high, theme)
    _draw_bar(figure, image, axes, 4.0 / height, 0.05 if high - low < 0.45 else 0.2, theme)
    return png(figure, theme)


def _draw_moments(axes: "Axes", moments: Mapping[str, float], theme: Theme) -> None:
    """Draw the loss over the moments, the dense level as a line across, with every value written beside its point."""
    xs, ys = list(range(len(moments))), list(moments.values())
    room = (max(ys) - min(ys)) or abs(ys[0]) or 1.0
    if "before" in moments:
        axes.axhline(moments["before"], color=theme.muted, linewidth=1, linestyle=(0, (4, 4)))
    axes.plot(xs, ys, color=theme.lines[0], linewidth=2, marker="o", markersize=7)
    box = {"facecolor": theme.surface, "edgecolor": "none", "pad": 1.0}
    for x, y in zip(xs, ys, strict=True):
        is_low = y < max(ys[max(0, x - 1) : x + 2])  # the line leaves it upwards, so its value goes below
        place: Any = {"xytext": (0, -11 if is_low else 11), "textcoords": "offset points", "ha": "center", "bbox": box}
        axes.annotate(f"{y:.4g}", (x, y), va="top" if is_low else "bottom", fontsize=10, color=theme.text, **place)
    axes.set_xticks(xs)
    axes.set_xticklabels([_MOMENTS[moment] for moment in moments])
    axes.set_xlim(-0.4, len(xs) - 0.6)
    axes.set_ylim(min(ys) - 0.3 * room, max(ys) + 0.3 * room)
    axes.set_title("Loss on held-out text, nats per token", loc="left", fontsize=10, color=theme.text)


def _draw_shares(axes: "Axes", shares: Mapping[str, float], theme: Theme) -> None:
    """Draw one bar for each share of a gap; the whole gap is the track behind it."""
    from matplotlib.ticker import PercentFormatter

    ys, values = list(range(len(shares))), list(shares.values())
    shown = [min(1.25, max(-0.25, value)) for value in values]
    axes.barh(ys, [1.0] * len(ys), color=theme.rule, height=0.55)
    axes.barh(ys, shown, color=theme.lines[0], height=0.55)
    for y, value, end in zip(ys, values, shown, strict=True):
        axes.annotate(
            f"{value:.0%}", (max(end, 0.0), y), (6, 0), textcoords="offset points", va="center", color=theme.text
        )
    axes.set_yticks(ys)
    axes.set_yticklabels(shares, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *shown, 0.0), max(1.15, *(value + 0.15 for value in shown)))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_title("Share of the gap recovered", loc="left", fontsize=10, color=theme.text)


def draw_recovery(gaps: Sequence[Mapping[str, object]], theme: Theme = LIGHT) -> bytes | None:
    """Draw the loss over the three moments, and the share of each gap that was recovered.

    Args:
        gaps: entries with `task`, `metric`, `before`, `pruned`, `recovered` and `share`, as in a recovery report; the
            one without a task is the loss. Shares are drawn between -25 and 125 %, with their true value beside.
        theme: the colours.

    Returns:
        a PNG, or None if no loss was measured twice and there is no share.
    """
    loss = next((gap for gap in gaps if not gap["task"]), {})
    values = {moment: loss.get(moment) for moment in _MOMENTS}
    moments = {key: float(v) for key, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    names = [f"{gap['task']}: {gap['metric']}" if gap["task"] else "loss" for gap in gaps]
    found = dict(zip(names, (gap.get("share") for gap in gaps), strict=True))
    shares = {name: float(v) for name, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
    if len(moments) < 2 and not shares:
        return None
    check_requirements()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, max(2.6, 1.2 + 0.34 * len(shares))), layout="constrained")
    panels = [draw for draw, wanted in (("loss", len(moments) > 1), ("shares", bool(shares))) if wanted]
    for name, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        style(axes, theme)
        if name == "loss":
            _draw_moments(axes, moments, theme)
        else:
            axes.grid(visible=False)
            _draw_shares(axes, shares, theme)
    return png(figure, theme)
