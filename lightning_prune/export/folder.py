"""Write a folder whole or not at all, with a note beside the weights of what was pruned.

Files are written into a sibling folder that is renamed at the end, so a run that is killed leaves no half-written
export under the name that was asked for. What was there stays, unless this program wrote it, or it is an export of this
library and `overwrite` was asked for.
"""

import importlib.util
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, getpid
from pathlib import Path
from typing import Any

from lightning_prune.base.types import Report

__all__ = [
    "NOTE_NAME",
    "NOTE_VERSION",
    "PLAN_NAME",
    "FolderTakenError",
    "check_file",
    "check_free",
    "check_writable",
    "new_folder",
    "read_note",
    "write_errors",
    "write_note",
    "write_plan_note",
]

NOTE_VERSION = 1
NOTE_NAME = "sparsity.json"
PLAN_NAME = "lightning_prune.json"

_PROGRAM = uuid.uuid4().hex  # tells what this program wrote from what was there before
_PROBE = bytes(4096)
_DAMAGED = "{path} is damaged: {why}; take it from the folder that was exported first, or delete it"


class FolderTakenError(ValueError):
    """The output folder holds something that stays."""


def write_errors() -> tuple[type[Exception], ...]:
    """Return what is raised when a disk refuses to take a model: full, read-only, gone, or the folder taken."""
    found = [OSError, RuntimeError, FolderTakenError]
    if importlib.util.find_spec("safetensors") is not None:
        found.append(importlib.import_module("safetensors").SafetensorError)
    return tuple(found)


def check_free(
    out_dir: str | PathLike[str], *, overwrite: bool = False, recipe: Mapping[str, object] | None = None
) -> Path:
    """Check that an export may be written to this folder, and return it.

    Args:
        out_dir: a folder that does not exist yet or is empty, or that an earlier training of this program wrote.
        overwrite: whether an export of this library may be written over.
        recipe: as plain values; an earlier training of this program is one with the same, and if what is there came
            from it in another program, the error says that there is nothing left to do.

    Raises:
        FolderTakenError: if the folder holds anything else, or the path is a file.
    """
    out = Path(out_dir).expanduser()
    if out.exists() and not out.is_dir():
        raise FolderTakenError(f"the output folder {out} is a file; name a new or an empty folder")
    if not out.is_dir() or not any(out.iterdir()):
        return out
    note = _note_of(out)
    is_same = recipe is not None and _same_recipe(note.get("recipe"), recipe)
    is_ours = note.get("program") == _PROGRAM and (recipe is None or is_same)
    if is_ours or (overwrite and note):
        return out
    way_out = "name a new or an empty folder"
    if overwrite:
        way_out = f"overwrite replaces exports of this library only, and it holds no {NOTE_NAME}; {way_out}"
    elif note and is_same:
        way_out = (
            "it holds what this same recipe wrote when it was finished, so there is nothing left to do: set "
            f"export.overwrite: true to make it again, or {way_out}"
        )
    elif note:
        way_out += ", or set export.overwrite: true to replace this earlier export"
    raise FolderTakenError(f"the output folder {out} is not empty; nothing was overwritten; {way_out}")


def check_writable(folder: str | PathLike[str]) -> None:
    """Check by writing that files can be put into a folder, which is made if it is not there.

    Raises:
        ValueError: if not: read-only, full, no permission, or a file in the way.
    """
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write into the folder {path}: {error.strerror or error}; name a folder on a disk that can be "
            "written and has room"
        ) from error


def check_file(name: str | PathLike[str]) -> Path:
    """Check that results may be written to this file, and return it; its folder is made if it is not there.

    Raises:
        ValueError: if it is a folder, or cannot be written.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file for the results, for example {path / 'results.json'}")
    check_writable(path.parent)
    return path


def _note_of(folder: Path) -> dict[str, Any]:
    """Return the note in an export of this library; empty if there is none that can be read."""
    for name in (NOTE_NAME, PLAN_NAME):
        try:
            note = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(note, dict):
            return note
    return {}


def read_note(folder: Path) -> dict[str, Any]:
    """Return the `sparsity.json` beside a model; empty if there is none.

    Raises:
        ValueError: if it is damaged.
        OSError: if it cannot be read now.
    """
    path = folder / NOTE_NAME
    if not path.exists():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(_DAMAGED.format(path=path, why=str(error))) from error
    for name, value in {"the whole": note, **(note if isinstance(note, dict) else {})}.items():
        if name in ("the whole", "targets", "recipe") and not isinstance(value, dict):
            why = f"{name} must be a mapping, got {type(value).__name__}"
            raise ValueError(_DAMAGED.format(path=path, why=why))
    return dict(note)


def _same_recipe(written: object, recipe: Mapping[str, object]) -> bool:
    def plain(values: object) -> object:
        copy = json.loads(json.dumps(values, default=str))
        if isinstance(copy, dict) and isinstance(copy.get("export"), dict):
            copy["export"].pop("overwrite", None)
        return copy

    return plain(written) == plain(dict(recipe))


@contextmanager
def new_folder(out_dir: str | PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into; it takes the wanted name when the block ends without an error.

    Args:
        out_dir: a folder that does not exist yet or is empty, or see `check_free`.
        overwrite: whether an export of this library may be written over; it goes when the new one is whole.

    Raises:
        FolderTakenError: if the folder holds anything else, or the path is a file.
    """
    out = check_free(out_dir, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (out.parent / f".{out.name}.{getpid()}.{end}" for end in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if check_free(out, overwrite=overwrite).is_dir():
            out.rename(replaced)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.is_dir() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)


def write_note(folder: Path, *, report: Report | None, recipe: Mapping[str, object] | None) -> None:
    """Write `sparsity.json`: what holds per target, and the recipe that made it; nothing if neither is known."""
    if report is None and recipe is None:
        return
    note: dict[str, object] = {"version": NOTE_VERSION, "program": _PROGRAM}
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
    (folder / NOTE_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def write_plan_note(folder: Path, note: Mapping[str, object]) -> None:
    """Write `lightning_prune.json`: what was cut from the parent model, so that it can be looked up and replayed."""
    (folder / PLAN_NAME).write_text(json.dumps({**note, "program": _PROGRAM}, indent=2) + "\n", encoding="utf-8")
