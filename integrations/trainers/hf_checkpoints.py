"""The pruning state in a checkpoint folder of Transformers, and which folder a resume starts from.

Transformers writes the model first and `trainer_state.json` last. The side file is written just before that, so a
process that is killed at any moment leaves a folder that is whole, or one that lacks `trainer_state.json`. Nothing is
ever renamed or moved: a resume passes half-written folders by, and the training that goes on writes them anew.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_prune.base.whole_file import written_aside
from lightning_prune.conductor.saved_state import load_file

__all__ = ["SIDE_FILE", "has_optimizer", "read_side_file", "resume_folder", "undone", "write_side_file"]

SIDE_FILE = "lightning_prune.pt"

_STATE_FILE = "trainer_state.json"
_CALLBACK = "PruningCallback"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")  # the last is FSDP's
_PREFIX = "checkpoint-"

logger = logging.getLogger(__name__)


def write_side_file(folder: Path, name: str, *, global_step: int, run: Mapping[str, Any]) -> None:
    """Write the state of a run into a checkpoint folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / name) as aside:
        torch.save({"global_step": global_step, "run": dict(run)}, aside)


def read_side_file(folder: Path, name: str, global_step: int) -> dict[str, Any]:
    """Read the state of a run from a checkpoint folder.

    Args:
        folder: of the checkpoint.
        name: of the side file.
        global_step: the step at which the training resumes.

    Raises:
        ValueError: if there is none, or it is damaged or belongs to another step.
        OSError: if it cannot be read now.
    """
    path = folder / name
    if not path.exists():
        others = sorted(file.name for file in folder.glob(f"{Path(SIDE_FILE).stem}*.pt"))
        why = (
            f"it holds {', '.join(others)} of a training with other pruning callbacks: give this one the same"
            if others
            else "it was saved without this callback, or the file was lost. To prune from its weights on, load them as "
            "the model of a new training; to resume a pruning, use a checkpoint that holds the file"
        )
        raise ValueError(f"training resumes at step {global_step} from {folder}, which holds no {name}: {why}")
    saved = load_file(str(path))
    run = saved.get("run")
    if not isinstance(run, dict) or "global_step" not in saved:
        raise ValueError(f"{path} is damaged or not ours: it holds no pruning state; use an earlier checkpoint")
    if saved["global_step"] != global_step:
        raise ValueError(
            f"{path} belongs to step {saved['global_step']}, the checkpoint to step {global_step}; they were mixed "
            "up: use an untouched checkpoint"
        )
    return run


def has_optimizer(folder: Path) -> bool:
    """Return whether a checkpoint holds the state of its optimizer; with `save_only_model` it does not."""
    return any((folder / name).exists() for name in _OPTIMIZERS)


def undone(folder: Path) -> str | None:
    """Return what is missing in a half-written or damaged checkpoint; None if it is whole.

    Raises:
        OSError: if a file cannot be read now, which says nothing of the checkpoint.
    """
    try:
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {_STATE_FILE}"
    except ValueError:
        return f"its {_STATE_FILE} is cut off or damaged"
    if not isinstance(state, dict) or not isinstance(state.get("stateful_callbacks", {}), dict):
        return f"its {_STATE_FILE} holds no state of a Trainer"
    saved = state.get("stateful_callbacks", {}).get(_CALLBACK, [])
    found = (_side_file_undone(folder, entry) for entry in (saved if isinstance(saved, list) else [saved]))
    return next((reason for reason in found if reason is not None), None)


def _side_file_undone(folder: Path, entry: Any) -> str | None:
    noted = entry.get("attributes", {}) if isinstance(entry, dict) else {}
    path = folder / noted.get("saved_as", SIDE_FILE)
    if not path.exists():
        return f"it has no {path.name}"
    try:
        saved = load_file(str(path))
    except ValueError:
        return f"its {path.name} is cut off or damaged"
    digest = noted.get("saved_digest")
    if digest is not None and digest != _digest(saved.get("run")):
        return f"its {path.name} was saved at another time than the rest"
    return None


def _digest(run: Any) -> str | None:
    try:
        return str(run["sparsifier"]["digest"])
    except (KeyError, TypeError):
        return None


def resume_folder(asked: Any, output_dir: Path) -> Any:
    """Return where a resume starts: at what was asked for, or at the last whole checkpoint if that is half-written.

    Only the newest checkpoint of the output folder, which is what `get_last_checkpoint` and `True` stand for, is
    passed by; a folder that was chosen by name is taken as it is.

    Args:
        asked: the argument of `Trainer.train`: a folder, True, or nothing.
        output_dir: of the training.

    Returns:
        what to resume from, as `Trainer.train` takes it; None if no checkpoint was written whole.

    Raises:
        OSError: if a checkpoint cannot be read now; older ones are not taken in its place.
    """
    folders = _newest_first(output_dir) if asked else []
    if not folders or not (asked is True or _is_same(asked, folders[0])):
        return asked
    for folder in folders:
        try:
            reason = undone(folder)
        except OSError as error:
            raise OSError(
                f"cannot read the checkpoint {folder} ({error}); nothing was changed, and no older one was taken: "
                "start again when it can be read, or name the checkpoint to resume from"
            ) from error
        if reason is None:
            return asked if folder is folders[0] else str(folder)
        logger.warning("%s is half-written: %s, so the process ended while saving it; it is passed by", folder, reason)
    logger.warning("no checkpoint in %s was written whole; training starts from the beginning", output_dir)
    return None


def _newest_first(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def _is_same(asked: Any, folder: Path) -> bool:
    return isinstance(asked, str | os.PathLike) and Path(asked).resolve() == folder.resolve()
