"""Sections of the report page for a model that chooses its units from the instruction.

All values are plain: what an adapter of a trainer has collected, or a program of the user's own.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_prune.report.condition_plots import (
    PARTS,
    draw_first_token,
    draw_guard,
    draw_overlap_by_block,
    draw_overlaps,
    draw_quality,
)
from lightning_prune.report.pictures import picture
from lightning_prune.report.tables import (
    as_number,
    escaped,
    format_count,
    format_percent,
    format_value,
    row_of,
    table_of,
)

__all__ = ["condition_figures", "condition_sections"]

Values = Mapping[str, object]


def condition_figures(condition: Values) -> list[tuple[str, str]]:
    """Return the figures that matter most, each with what it is."""
    figures = []
    activated, total = as_number(condition.get("num_activated")), as_number(condition.get("num_parameters"))
    if activated is not None and total:
        figures.append((format_count(activated), f"of {format_count(total)} parameters compute for an instruction"))
    last = _last(condition)
    for key, show, said in (
        ("overlap", format_percent, "of their units are shared by two instructions"),
        ("swap_cost", format_value, "nats per token is what another instruction's units cost"),
    ):
        if as_number(last.get(key)) is not None:
            figures.append((show(last.get(key)), said))
    return figures


def condition_sections(folder: Path, condition: Values) -> dict[str, str]:
    """Return title -> body of every section for which there are values; plots are written beside the page.

    Args:
        folder: of the page.
        condition: any of `method`, `num_parameters`, `num_activated`, `num_added`; `groups`, entries with `name`,
            `num_units`, `keep`, `always`, `ever`; `measurements`, see `draw_guard` and `draw_overlap_by_block`;
            `instructions` and `between`, see `draw_overlaps`; `first_token`, see `draw_first_token`, or `note`, why it
            was not measured; `quality`, see `draw_quality`.
    """
    groups, measurements = _listed(condition, "groups"), _listed(condition, "measurements")
    return {
        "Units and parameters": _units(condition, groups),
        "Units that instructions share": _overlaps(folder, condition),
        "Units that two instructions share, by block, in percent": _blocks(folder, groups, measurements),
        "Does the choice depend on the instruction": _guard(folder, measurements),
        "Quality against activated parameters": _quality(folder, _listed(condition, "quality")),
        "Time to the first token": _first_token(folder, condition.get("first_token")),
    }


def _listed(values: Values, key: str) -> list[Any]:
    found = values.get(key)
    return list(found) if isinstance(found, list | tuple) else []


def _last(condition: Values) -> Values:
    measurements = _listed(condition, "measurements")
    return measurements[-1] if measurements else {}


def _said(text: str) -> str:
    return f'<p class="muted small" style="margin:14px 0 0">{escaped(text)}</p>'


def _units(condition: Values, groups: Sequence[Values]) -> str:
    """Return the table of blocks: how many units are kept of all, and which ones no instruction changes."""
    rows = []
    for group in groups:
        counts = [as_number(group.get(key)) for key in ("num_units", "keep", "always", "ever")]
        units, keep, always, ever = ("-" if count is None else f"{count:,.0f}" for count in counts)
        share = format_percent(counts[1] / counts[0]) if counts[0] and counts[1] is not None else "-"
        rows.append(row_of(f"<code>{escaped(group.get('name'))}</code>", units, keep, share, always, ever))
    head = ("Block", "Units", "Kept", "Share", "In every choice", "In any choice")
    facts = []
    activated, total = as_number(condition.get("num_activated")), as_number(condition.get("num_parameters"))
    if activated is not None and total:
        share = format_percent(activated / total)
        facts.append(f"{activated:,.0f} of {total:,.0f} parameters ({share}) compute for one instruction.")
    added = as_number(condition.get("num_added"))
    if added is not None:
        facts.append(f"{condition.get('method', 'The condition')} added {added:,.0f} parameters.")
    return (table_of(head, rows) if rows else "") + "".join(map(_said, facts))


def _overlaps(folder: Path, condition: Values) -> str:
    """Return the matrix of instructions, and what they were."""
    instructions, between = _listed(condition, "instructions"), _listed(condition, "between")
    if len(between) < 2:
        return ""
    pairs = [(between[a][b], a, b) for a in range(len(between)) for b in range(a)]
    (low, *least), (high, *most) = min(pairs), max(pairs)
    alt = (
        f"Heat map of the units that each two of {len(between)} instructions share, in percent: from "
        f"{format_percent(low)}, instructions {least[1] + 1} and {least[0] + 1}, to {format_percent(high)}, "
        f"instructions {most[1] + 1} and {most[0] + 1}."
    )
    labels = [str(number + 1) for number in range(len(between))]
    plot = picture(
        folder / "overlaps.png", lambda theme: draw_overlaps(labels, between, theme), alt=alt, otherwise="One row."
    )
    listed = "".join(f"<li><code>{escaped(text)}</code></li>" for text in instructions)
    said = _said("Each row is followed by the instruction that is most alike; 100 % on the diagonal is left out.")
    folded = f"<details><summary>Show the {len(instructions)} instructions</summary><ol>{listed}</ol></details>"
    return plot + said + (folded if listed else "")


def _blocks(folder: Path, groups: Sequence[Values], measurements: Sequence[Values]) -> str:
    if not groups or not any("by_group" in entry for entry in measurements):
        return ""
    names = [str(group.get("name")) for group in groups]
    last: Any = [entry for entry in measurements if "by_group" in entry][-1]
    shares = ", ".join(f"{name} {format_percent(share)}" for name, share in zip(names, last["by_group"], strict=True))
    alt = f"Heat map of the units that two instructions share, by block and step. At step {last['step']}: {shares}."
    return picture(
        folder / "blocks.png",
        lambda theme: draw_overlap_by_block(names, measurements, theme),
        alt=alt,
        otherwise="No block was measured.",
    )


def _guard(folder: Path, measurements: Sequence[Values]) -> str:
    """Return the guard's measurements over the steps, and the last ones as a table."""
    if not measurements:
        return ""
    first, last = measurements[0], measurements[-1]
    said = []
    for key, name in (("overlap", "overlap"), ("score_spread", "spread"), ("swap_cost", "cost of a swap")):
        if as_number(last.get(key)) is not None:
            said.append(f"{name} from {format_value(first.get(key))} to {format_value(last.get(key))}")
    alt = f"Plots of {len(measurements)} measurements over optimizer steps: {'; '.join(said)}."
    plot = picture(
        folder / "guard.png", lambda theme: draw_guard(measurements, theme), alt=alt, otherwise="Nothing was measured."
    )
    losses = [(name, as_number(last.get(key))) for name, key in _LOSSES]
    own = as_number(last.get("own_loss"))
    rows = [
        row_of(name, format_value(loss), "" if own is None or name == _LOSSES[0][0] else f"{loss - own:+.3f}")
        for name, loss in losses
        if loss is not None and math.isfinite(loss)
    ]
    head = (f"Loss at step {last.get('step')}, nats per token", "Loss", "Less that with its own")
    return plot + (f'<div style="margin-top:18px">{table_of(head, rows)}</div>' if rows else "")


_LOSSES = (
    ("Units of its own instruction", "own_loss"),
    ("Units of another instruction", "swapped_loss"),
    ("All units", "whole_loss"),
)


def _first_token(folder: Path, first_token: object) -> str:
    if not isinstance(first_token, Mapping):
        return ""
    if "note" in first_token:
        return _said(f"Not measured: {first_token['note']}")
    times = {name: value for name, value in first_token.items() if as_number(value) is not None}
    total = sum(float(times.get(part, 0.0)) for part in PARTS)
    shares = ", ".join(f"{part} {1e3 * float(times[part]):.3g} ms" for part in PARTS if part in times)
    alt = f"Bars of the time to the first token: {1e3 * total:.3g} ms in all ({shares})"
    if "whole_prefill" in times:
        alt += f"; prefill of all units {1e3 * float(times['whole_prefill']):.3g} ms"
    plot = picture(
        folder / "first_token.png",
        lambda theme: draw_first_token(times, theme),
        alt=f"{alt}.",
        otherwise="Not every part was measured.",
    )
    facts = []
    if (tokens := as_number(first_token.get("num_tokens"))) is not None:
        facts.append(f"One prompt of {tokens:,.0f} tokens on {first_token.get('device', 'this machine')}.")
    if (difference := as_number(first_token.get("difference"))) is not None:
        said = f"{difference:.1e}"
        facts.append(f"The small model's logits differ from those of the masked whole by {said} at most.")
    return plot + "".join(map(_said, facts))


def _quality(folder: Path, rows: Sequence[Values]) -> str:
    """Return loss against activated parameters, as plot and table."""
    if not rows:
        return ""
    alt = "Plot of the loss against activated parameters: " + "; ".join(
        f"{entry.get('arm')} {format_value(entry.get('loss'))} with {format_count(_number(entry))}" for entry in rows
    )
    plot = picture(
        folder / "quality.png", lambda theme: draw_quality(rows, theme), alt=f"{alt}.", otherwise="No rows were given."
    )
    best: dict[float, float] = {}
    for entry in rows:
        best[_number(entry)] = min(_loss(entry), best.get(_number(entry), math.inf))
    body = [
        row_of(
            escaped(entry.get("arm")),
            format_count(_number(entry)),
            format_value(entry.get("loss")),
            f"{_loss(entry) - best[_number(entry)]:+.3f}",
        )
        for entry in sorted(rows, key=lambda entry: (-_number(entry), _loss(entry)))
    ]
    head = ("By size, then by loss", "Activated", "Loss, nats per token", "Over the best of its size")
    return plot + f'<div style="margin-top:18px">{table_of(head, body)}</div>'


def _loss(entry: Values) -> float:
    loss = as_number(entry.get("loss"))
    return math.nan if loss is None else loss


def _number(entry: Values) -> float:
    return as_number(entry.get("num_activated")) or 0.0
