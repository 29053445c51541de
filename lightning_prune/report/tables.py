"""Tables of the report page, as HTML: the model before, during and after the run, its recovery, and every target.

Every name and value that comes from outside is escaped here.
"""

import html
import math
from collections.abc import Mapping, Sequence

__all__ = [
    "as_number",
    "before_after",
    "cards",
    "escaped",
    "evaluations_during",
    "evaluations_table",
    "format_count",
    "format_percent",
    "format_value",
    "recovery_table",
    "row_of",
    "table_of",
    "targets_table",
    "versions_table",
]

Values = Mapping[str, object]

_MAX_OPEN_TARGETS = 60
_EFFORT = ("num_trained", "num_parameters", "num_tokens")
_MOMENTS = {"before": "Before pruning", "pruned": "Right after pruning", "recovered": "After recovery"}
# What a report counts: its words, the key when dense, the key without zeros, the unit.
_COUNTS = (
    ("Non-zero parameters", "num_parameters", "num_nonzeros", ""),
    ("Size of non-zero values", "num_bytes", "num_bytes_nonzero", "B"),
    ("FLOPs per token, zeros left out", "flops_per_token", "flops_per_token_nonzero", ""),
)


def escaped(value: object) -> str:
    """Return the text of a value, safe inside HTML text and attributes."""
    return html.escape(str(value), quote=True)


def as_number(value: object) -> float | None:
    """Return a number as float; None for all else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def format_count(value: float, unit: str = "") -> str:
    """Write a count with three significant digits and k, M, G or T; whole below a thousand.

    >>> format_count(3148224), format_count(999), format_count(6296448, "B")
    ('3.15 M', '999', '6.30 MB')
    """
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            decimals = max(0, 2 - math.floor(math.log10(abs(scaled) * 1.0005)))
            return f"{scaled:.{decimals}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def format_value(value: object) -> str:
    """Write a measured value with four significant digits.

    >>> format_value(5.58964), format_value(0.25), format_value(124852.3), format_value(None)
    ('5.590', '0.2500', '124,852', '-')
    """
    number = as_number(value)
    if number is None:
        return "-"
    if not math.isfinite(number):
        return str(number)
    if number != 0 and abs(number) < 1e-3:
        return f"{number:.3e}"
    decimals = 4 if abs(number) < 1 else max(0, 3 - math.floor(math.log10(abs(number))))
    return f"{number:,.{decimals}f}"


def format_percent(value: object) -> str:
    """Write a share of one in percent.

    >>> format_percent(0.5)
    '50.00 %'
    """
    number = as_number(value)
    return "-" if number is None or not math.isfinite(number) else f"{100 * number:.2f} %"


def _change(before: object, after: object) -> str:
    """Write by how much a value moved, in percent of what it was."""
    old, new = as_number(before), as_number(after)
    if old is None or new is None or not math.isfinite(old) or not math.isfinite(new) or old == 0:
        return "-"
    return f"{100 * (new - old) / abs(old):+.1f} %"


def table_of(head: Sequence[str], rows: Sequence[str]) -> str:
    """Join a head of plain words and rows of finished HTML; wide tables scroll in their own box."""
    cells = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row_of(name: str, *cells: str) -> str:
    """Return one row of a table; the name and the cells are finished HTML."""
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _part(title: str, num_columns: int) -> str:
    return f'<tr class="part"><th scope="colgroup" colspan="{num_columns}">{escaped(title)}</th></tr>'


def _flatten(evaluation: Values) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Return (task, metric) -> (value, its standard error); names that lm-eval writes as `acc,none` become `acc`."""
    values: dict[tuple[str, str], tuple[float, float | None]] = {}
    results = evaluation.get("results")
    for task, metrics in results.items() if isinstance(results, Mapping) else ():
        numbers = {str(key): number for key, value in metrics.items() if (number := as_number(value)) is not None}
        for key, value in numbers.items():
            metric, _, filter_name = key.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{filter_name}", numbers.get(f"{metric}_stderr"))
            shown = metric if filter_name in ("", "none") else f"{metric} ({filter_name})"
            values[str(task), shown] = (value, error)
    return values


def _measured(pair: tuple[float, float | None] | None) -> str:
    """Write a value, and its standard error where one was estimated."""
    if pair is None:
        return "-"
    value, error = pair
    if error is None or not math.isfinite(error):
        return escaped(format_value(value))
    return f'{escaped(format_value(value))} <span class="muted small">&plusmn; {escaped(format_value(error))}</span>'


def _labelled(evaluations: Sequence[Values], label: str) -> Values | None:
    """Return the last evaluation with this label."""
    return next((evaluation for evaluation in reversed(evaluations) if evaluation.get("label") == label), None)


def before_after(report: Values, evaluations: Sequence[Values]) -> str:
    """Return the table of the model and its evaluations before and after pruning."""
    before, after = _labelled(evaluations, "before"), _labelled(evaluations, "after")
    old = before.get("report") if before else None
    rows = [_part("Model", 4)]
    for name, key in (("Sparsity of the targets", "sparsity"), ("Sparsity of the model", "model_sparsity")):
        first = old.get(key) if isinstance(old, Mapping) else 0.0
        rows.append(row_of(name, format_percent(first), format_percent(report.get(key)), ""))
    for name, dense_key, key, unit in _COUNTS:
        dense, now = as_number(report.get(dense_key)), as_number(report.get(key))
        first = as_number(old.get(key)) if isinstance(old, Mapping) else dense
        if dense and now is not None:
            cells = ("-" if value is None else format_count(value, unit) for value in (first, now))
            rows.append(row_of(name, *cells, _change(first, now)))
    old_values, new_values = _flatten(before or {}), _flatten(after or {})
    previous = None
    for task, metric in dict.fromkeys([*old_values, *new_values]):
        if task != previous:
            previous = task
            rows.append(_part(task, 4))
        old_pair, new_pair = old_values.get((task, metric)), new_values.get((task, metric))
        change = _change(old_pair and old_pair[0], new_pair and new_pair[0])
        rows.append(row_of(escaped(metric), _measured(old_pair), _measured(new_pair), change))
    head = ("", "Before" if before else "Dense", "After" if after else "Now", "Change")
    note = "Sizes and FLOPs leave zeros out; a dense kernel still stores and multiplies them."
    return table_of(head, rows) + f'<p class="muted small" style="margin:14px 0 0">{note}</p>'


def evaluations_during(evaluations: Sequence[Values]) -> str:
    """Return the table of evaluations by step; empty if there is none but the first and the last."""
    if {evaluation.get("label") for evaluation in evaluations} <= {"before", "after"}:
        return ""
    return evaluations_table(evaluations)


def evaluations_table(evaluations: Sequence[Values], *, has_sparsity: bool = True) -> str:
    """Return the table of all evaluations by step, with the sparsity at each or without; empty if there is none."""
    if not evaluations:
        return ""
    flat = [_flatten(evaluation) for evaluation in evaluations]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = []
    for evaluation, values in zip(evaluations, flat, strict=True):
        summary = evaluation.get("report")
        sparsity = summary.get("sparsity") if isinstance(summary, Mapping) else None
        cells = [_measured(values.get(key)) for key in keys]
        label, step = (escaped(evaluation.get(key, "-")) for key in ("label", "step"))
        rows.append(row_of(label, step, *([format_percent(sparsity)] if has_sparsity else []), *cells))
    head = ["", "Step", *(["Sparsity"] if has_sparsity else []), *(f"{task}: {metric}" for task, metric in keys)]
    return table_of(head, rows)


def cards(report: Values, evaluations: Sequence[Values], *, figures: Sequence[tuple[str, str]] | None = None) -> str:
    """Return the figures that matter most, and the first metric of each of the first two tasks.

    Args:
        report: what was pruned.
        evaluations: the tasks.
        figures: values, each with what it is, in place of those of a pruned model.
    """
    figures = _pruned_figures(report) if figures is None else list(figures)
    before, after = (_flatten(_labelled(evaluations, label) or {}) for label in ("before", "after"))
    first_of_task = {task: (task, metric) for task, metric in reversed(after)}
    for key in list(reversed(first_of_task.values()))[:2]:
        said = f", before {format_value(before[key][0])}" if key in before else ""
        figures.append((format_value(after[key][0]), f"{key[0]}: {key[1]}{said}"))
    body = "".join(
        f'<div class="card"><b>{escaped(value)}</b><span>{escaped(label)}</span></div>' for value, label in figures
    )
    return f'<div class="cards">{body}</div>'


def _pruned_figures(report: Values) -> list[tuple[str, str]]:
    figures = [(format_percent(report.get("sparsity")), "of the targets' weights are zero")]
    kept, total = as_number(report.get("num_nonzeros")), as_number(report.get("num_parameters"))
    if kept is not None and total:
        figures.append((format_count(kept), f"of {format_count(total)} parameters are not zero"))
    return figures


def _measure_name(gap: Values) -> str:
    return f"{gap['task']}: {gap['metric']}" if gap.get("task") else "Loss, nats per token"


def _recovery_facts(recovery: Values, gaps: Sequence[Values]) -> str:
    """Say what recovery took, what the loss was measured on, and why a measure has no share."""
    facts = []
    effort, moments = recovery.get("effort"), recovery.get("moments")
    if isinstance(effort, Mapping):
        trained, whole, tokens = (format_count(as_number(effort.get(key)) or 0.0) for key in _EFFORT)
        share, taken = format_percent(effort.get("trained_share")), as_number(effort.get("seconds")) or 0.0
        facts.append(f"Trained {trained} of {whole} parameters ({share}) on {tokens} tokens in {taken:,.0f} s.")
    found = moments.values() if isinstance(moments, Mapping) else ()
    losses = [moment.get("loss") for moment in found if isinstance(moment, Mapping)]
    measured = next((loss for loss in losses if isinstance(loss, Mapping)), None)
    if measured is not None:
        tokens = format_count(as_number(measured.get("num_tokens")) or 0.0)
        facts.append(f"Loss on {tokens} tokens of {measured.get('data')}.")
    for note in dict.fromkeys(gap["note"] for gap in gaps if gap.get("note")):
        names = ", ".join(_measure_name(gap) for gap in gaps if gap.get("note") == note)
        facts.append(f"No share of the gap: {note} ({names}).")
    return "".join(f'<p class="muted small" style="margin:14px 0 0">{escaped(fact)}</p>' for fact in facts)


def recovery_table(recovery: Values) -> str:
    """Return the table of every measure at the moments, with the share of its gap that was recovered.

    Args:
        recovery: `RecoveryReport.as_dict()`.
    """
    found = recovery.get("gaps")
    gaps = [gap for gap in found if isinstance(gap, Mapping)] if isinstance(found, list | tuple) else []
    rows = []
    for gap in gaps:
        values = (escaped(format_value(gap.get(moment))) for moment in _MOMENTS)
        rows.append(row_of(escaped(_measure_name(gap)), *values, f"<b>{format_percent(gap.get('share'))}</b>"))
    table = table_of(["", *_MOMENTS.values(), "Gap recovered"], rows) if rows else ""
    return table + _recovery_facts(recovery, gaps)


def targets_table(targets: Sequence[Values]) -> str:
    """Return the table of targets, folded away if it is long."""
    rows = []
    for target in targets:
        share = as_number(target.get("sparsity")) or 0.0
        shape = target.get("shape")
        size = " x ".join(str(length) for length in shape) if isinstance(shape, Sequence) else ""
        bar = f'<span class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'
        counts = (f"{int(as_number(target.get(key)) or 0):,}" for key in ("num_weights", "num_zeros"))
        rows.append(
            row_of(f"<code>{escaped(target.get('name'))}</code>", escaped(size), *counts, bar + format_percent(share))
        )
    table = table_of(("Target", "Shape", "Weights", "Zeros", "Sparsity"), rows)
    if len(targets) <= _MAX_OPEN_TARGETS:
        return table
    return f"<details><summary>Show all {len(targets)} targets</summary>{table}</details>"


def versions_table(versions: Mapping[str, str]) -> str:
    """Return the table of packages and their versions."""
    return table_of(
        ("Package", "Version"), [row_of(escaped(name), escaped(version)) for name, version in versions.items()]
    )
