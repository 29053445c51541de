"""Write a folder whole or not at all, with a note beside the weights of what was pruned.

Files are written into a sibling folder that is renamed at the end, so a run that is killed leaves no half-written
export under the name that was asked for.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, getpid
from pathlib import Path

from lightning_prune.types import Report

__all__ = ["NOTE_VERSION", "PLAN_NAME", "check_free", "new_folder", "write_note", "write_plan_note"]

NOTE_VERSION = 1
PLAN_NAME = "lightning_prune.json"


def check_free(out_dir: str | PathLike[str]) -> Path:
    """Check that an export may be written to this folder, and return it.

    Raises:
        ValueError: if the folder is not empty, or the path is a file.
    """
    out = Path(out_dir).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output folder {out} is a file; name a new or an empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"the output folder {out} is not empty; nothing was overwritten; name a new or an empty folder"
        )
    return out


@contextmanager
def new_folder(out_dir: str | PathLike[str]) -> Iterator[Path]:
    """Give a folder to write into; it takes the wanted name when the block ends without an error.

    Args:
        out_dir: a folder that does not exist yet or is empty.

    Raises:
        ValueError: if the folder is not empty, or the path is a file.
    """
    out = check_free(out_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        check_free(out)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_note(folder: Path, *, report: Report | None, recipe: Mapping[str, object] | None) -> None:
    """Write `sparsity.json`: what holds per target, and the recipe that made it; nothing if neither is known."""
    if report is None and recipe is None:
        return
    note: dict[str, object] = {"version": NOTE_VERSION}
    if report is not None:
        note |= {
            "sparsity": report.sparsity,
            "model_sparsity": report.model_sparsity,
            "num_parameters": report.num_parameters,
            "num_nonzeros": report.num_nonzeros,
            "targets": {target.name: target.sparsity for target in report.targets},
        }
    if recipe is not None:
        note["recipe"] = dict(recipe)
    (folder / "sparsity.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def write_plan_note(folder: Path, note: Mapping[str, object]) -> None:
    """Write `lightning_prune.json`: what was cut from the parent model, so that it can be looked up and replayed."""
    (folder / PLAN_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
