"""Write the report folder of a run: report.json, plots as PNG, and index.html that opens without network.

index.html is one file: style, plots and numbers are inside it. Every file is written aside and then renamed, so a
reader never meets half a page, and a run may write its report again and again.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_prune.report.condition import condition_figures, condition_sections
from lightning_prune.report.pictures import picture, write_file
from lightning_prune.report.plots import (
    check_requirements,
    draw_heatmap,
    draw_history,
    draw_recovery,
    group_targets,
)
from lightning_prune.report.tables import (
    as_number,
    before_after,
    cards,
    escaped,
    evaluations_during,
    evaluations_table,
    format_percent,
    format_value,
    recovery_table,
    targets_table,
    versions_table,
)

__all__ = ["check_requirements", "write_report"]

Values = Mapping[str, object]

_FORMAT = 1
_PACKAGES = ("lightning_prune", "torch", "torchmetrics", "lightning", "transformers", "peft", "lm_eval")

_STYLE = """
:root{color-scheme:light dark;--page:#f5f7fb;--surface:#fff;--text:#1c2330;--muted:#5d6778;--rule:#e3e7ee;
--accent:#2f55d4;--track:#e8edfb}
@media(prefers-color-scheme:dark){:root{--page:#0f131b;--surface:#171c26;--text:#e8ecf3;--muted:#9aa5b8;
--rule:#2c3444;--accent:#86a3ff;--track:#263049}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1040px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:28px;line-height:1.2;letter-spacing:-.02em;margin:0 0 4px}
h2{font-size:17px;letter-spacing:-.01em;margin:0 0 14px}
p{margin:0 0 12px}.muted{color:var(--muted)}.small{font-size:13px}
section{background:var(--surface);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin-top:20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin-top:24px}
.card{background:var(--surface);border:1px solid var(--rule);border-radius:12px;padding:16px 18px;min-width:0}
.card b{display:block;font-size:25px;line-height:1.25;letter-spacing:-.02em;font-weight:650;overflow-wrap:anywhere}
.card span{display:block;color:var(--muted);font-size:13px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:8px 12px 8px 0;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child{text-align:left;white-space:normal;min-width:8em}
th:last-child,td:last-child{padding-right:0}
tbody tr:last-child>*{border-bottom:0}
th{font-weight:600}thead th,.part th{color:var(--muted);font-size:13px}
tbody th{font-weight:400}.part th{padding-top:20px;font-weight:600}
.bar{display:inline-block;width:96px;height:7px;border-radius:4px;background:var(--track);margin-right:10px;
vertical-align:1px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--accent)}
img{display:block;max-width:100%;height:auto;margin:0 auto}
code,pre{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:0;overflow-x:auto}
ul{margin:0;padding-left:20px}li{overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--accent)}
@media(max-width:560px){main{padding:24px 12px 40px}section{padding:18px 16px}}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
"""


def _plain(value: object) -> object:
    """Return a copy that strict JSON can hold: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _section(title: str, body: str) -> str:
    """Return one box of the page; empty if it has no body."""
    return f"<section><h2>{escaped(title)}</h2>{body}</section>\n" if body else ""


def _history_plot(path: Path, history: Sequence[Values]) -> str:
    """Return the plot over time; its alternative text says where the curves start and end."""
    alt = [f"Plot of {len(history)} entries over optimizer steps"]
    for name in ("sparsity", "loss"):
        values = [value for entry in history if (value := as_number(entry.get(name))) is not None]
        if values:
            show = format_percent if name == "sparsity" else format_value
            alt.append(f"{name} from {show(values[0])} to {show(values[-1])}")
    nothing = "Nothing was logged over time, so there is nothing to plot."
    return picture(path, lambda theme: draw_history(history, theme), alt="; ".join(alt) + ".", otherwise=nothing)


def _layers_plot(path: Path, targets: Sequence[Values]) -> str:
    """Return the heat map; its values are in the table of targets too."""
    grid = group_targets(targets)
    alt = f"Heat map of the sparsity of {len(targets)} targets, {len(grid.rows)} layers by {len(grid.columns)} kinds."
    return picture(path, lambda theme: draw_heatmap(grid, theme), alt=alt, otherwise="The report lists no targets.")


def _listed(report: Values, key: str) -> list[Any]:
    value = report.get(key)
    return list(value) if isinstance(value, list | tuple) else []


def _recovery(path: Path, recovery: Values) -> str:
    """Return what recovery won back: plot and table."""
    gaps = _listed(recovery, "gaps")
    shares = [(gap, share) for gap in gaps if (share := as_number(gap.get("share"))) is not None]
    said = "; ".join(f"{gap['task'] or 'loss'}: {format_percent(share)} of the gap recovered" for gap, share in shares)
    alt = f"Plot of the loss before pruning, right after and after recovery; {said or 'no share of a gap is defined'}."
    plot = picture(path, lambda theme: draw_recovery(gaps, theme), alt=alt, otherwise="No moment was measured twice.")
    return f'{plot}<div style="margin-top:18px">{recovery_table(recovery)}</div>'


def _target_sections(path: Path, targets: Sequence[Values]) -> dict[str, str]:
    return {
        "Sparsity by layer, in percent": _layers_plot(path, targets),
        "Targets": targets_table(targets) if targets else "",
    }


def _notes(notes: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(note)}</li>' for note in notes)}</ul>" if notes else ""


def _page(report: Values, figures: str, sections: Mapping[str, str], title: str) -> str:
    step = int(as_number(report.get("step")) or 0)
    moment = f"After {step:,} optimizer step{'' if step == 1 else 's'}." if step else "No optimizer step taken."
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<header><h1>{title}</h1><p class="muted">{moment}</p></header>\n'
        f"{figures}\n{''.join(_section(*item) for item in sections.items())}</main></body></html>\n"
    )


def _parts(
    folder: Path,
    report: Values,
    history: Sequence[Values],
    evaluations: Sequence[Values],
    recovery: Values | None,
    condition: Values | None,
) -> tuple[str, str, dict[str, str], dict[str, str]]:
    """Return the title, the figures, and the sections before and after the notes."""
    if condition is None:
        recovered = "" if recovery is None else _recovery(folder / "recovery.png", recovery)
        title, figures = "Pruning report", cards(report, evaluations)
        first = {"Before and after": before_after(report, evaluations), "Recovery": recovered}
        last = {
            "Sparsity and loss over time": _history_plot(folder / "history.png", history),
            "Evaluations during the run": evaluations_during(evaluations),
            **_target_sections(folder / "layers.png", _listed(report, "targets")),
        }
    else:
        title, figures = "Conditioning report", cards(report, evaluations, figures=condition_figures(condition))
        first = {"Evaluations": evaluations_table(evaluations, has_sparsity=False)}
        losses = [{key: value for key, value in entry.items() if key != "sparsity"} for entry in history]
        last = {
            **condition_sections(folder, condition),
            "Loss over time": _history_plot(folder / "history.png", losses) if losses else "",
        }
    return title, figures, first, last


def write_report(
    directory: str | os.PathLike[str],
    *,
    report: Values,
    history: Sequence[Values],
    evaluations: Sequence[Values],
    recipe_text: str,
    notes: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    recovery: Values | None = None,
    condition: Values | None = None,
) -> Path:
    """Write report.json, the plots and index.html into a folder, over those of an earlier moment of the run.

    Args:
        directory: made if it does not exist.
        report: `Report.as_dict()`.
        history: entries with `step` and any of `sparsity`, `loss` and other metrics.
        evaluations: entries with `label` ("before", "after" or any other), `step`, `report` (a summary) and `results`
            (task -> metric -> value).
        recipe_text: the recipe as YAML.
        notes: what a reader must know; those of the report are added.
        versions: name -> version; those of the installed packages if left out.
        recovery: `RecoveryReport.as_dict()`; None where nothing was recovered; not on the page of a condition.
        condition: what `condition_sections` shows, on a page that does not speak of sparsity; None for other models.

    Returns:
        the path of index.html.

    Raises:
        ImportError: if matplotlib is missing.
    """
    check_requirements()
    (folder := Path(directory)).mkdir(parents=True, exist_ok=True)
    all_notes = list(dict.fromkeys([*notes, *_listed(report, "notes")]))
    all_versions = dict(_installed_versions() if versions is None else versions)
    record = {"format": _FORMAT, "report": report, "history": history, "evaluations": evaluations}
    record |= {"recipe": recipe_text, "notes": all_notes, "versions": all_versions}
    record |= {k: part for k, part in (("recovery", recovery), ("condition", condition)) if part is not None}
    write_file(folder / "report.json", json.dumps(_plain(record), indent=1, allow_nan=False).encode())
    title, figures, first, last = _parts(folder, report, history, evaluations, recovery, condition)
    sections = {
        **first,
        "Notes": _notes(all_notes),
        **last,
        "Recipe": f'<pre tabindex="0">{escaped(recipe_text)}</pre>',
        "Versions": versions_table(all_versions),
    }
    write_file(page := folder / "index.html", _page(report, figures, sections, title).encode())
    return page
