"""Which checkpoint a resume starts from, and that nobody's folders are touched on the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from lightning_prune.integrations.trainers.hf_checkpoints import (
    SIDE_FILE,
    read_side_file,
    resume_folder,
    undone,
    write_side_file,
)
from lightning_prune.integrations.trainers.hf_trainer import PruningCallback
from tests.integrations.trainings import hf_trainer
from tests.loops import assert_same_weights, recipe
from tests.tiny_models import tiny_llama

SAVES = {"save_strategy": "steps", "save_steps": 5}


def checkpoint(out: Path, step: int, *, missing: str = "", digest: str = "d") -> Path:
    """Write a checkpoint folder of a training with one pruning callback, as Transformers does."""
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if missing != SIDE_FILE:
        write_side_file(folder, SIDE_FILE, global_step=step, run={"sparsifier": {"digest": "d"}})
    state = {"stateful_callbacks": {"PruningCallback": {"args": {}, "attributes": {"saved_digest": digest}}}}
    if missing != "trainer_state.json":
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train(out: Path, *, resume: Any = None, seed: int = 99) -> Any:
    trainer = hf_trainer(tiny_llama(seed=seed), out, [PruningCallback(recipe())], **SAVES)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "has no trainer_state.json"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"global'), "trainer_state.json is cut off"),
        (lambda folder: (folder / "trainer_state.json").write_text("[]"), "holds no state of a Trainer"),
        (lambda folder: (folder / SIDE_FILE).unlink(), "has no lightning_prune.pt"),
        (lambda folder: (folder / SIDE_FILE).write_bytes(b"PK"), "lightning_prune.pt is cut off"),
        (
            lambda folder: write_side_file(
                folder, SIDE_FILE, global_step=9, run={"sparsifier": {"digest": "of another step"}}
            ),
            "lightning_prune.pt was saved at another time",
        ),
    ],
)
def test_what_is_half_written(tmp_path: Path, damage: Any, reason: str) -> None:
    folder = checkpoint(tmp_path, 9)
    assert undone(folder) is None
    damage(folder)
    assert reason in str(undone(folder))


def test_a_checkpoint_without_this_callback_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    assert undone(folder) is None


def test_the_last_whole_checkpoint_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10, missing="trainer_state.json")
    before = listing(tmp_path)
    for asked in (True, str(newest), newest):
        assert resume_folder(asked, tmp_path) == str(whole)
    assert "checkpoint-10 is half-written: it has no trainer_state.json" in caplog.text
    assert resume_folder(str(whole), tmp_path) == str(whole)
    assert resume_folder(None, tmp_path) is None
    assert resume_folder(str(tmp_path / "elsewhere"), tmp_path) == str(tmp_path / "elsewhere")
    assert listing(tmp_path) == before


def test_nothing_is_passed_by_where_all_is_whole(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    assert resume_folder(True, tmp_path) is True
    assert resume_folder(str(newest), tmp_path) == str(newest)


def test_without_a_whole_checkpoint_training_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint(tmp_path, 9, missing=SIDE_FILE)
    assert resume_folder(True, tmp_path) is None
    assert "was written whole; training starts from the beginning" in caplog.text


@pytest.mark.parametrize("name", ["trainer_state.json", SIDE_FILE])
def test_a_passing_read_error_takes_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)

    def stale(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Stale file handle")

    if name == SIDE_FILE:
        monkeypatch.setattr(torch, "load", stale)
    else:
        monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match=r"checkpoint-10 \(Stale file handle\); nothing was changed"):
        resume_folder(True, tmp_path)


def test_a_side_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_side_file(tmp_path, SIDE_FILE, global_step=4, run={"sparsifier": {}})

    def full(content: Any, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_side_file(tmp_path, SIDE_FILE, global_step=5, run={})
    assert read_side_file(tmp_path, SIDE_FILE, 4) == {"sparsifier": {}}


def test_constructing_a_trainer_touches_nothing(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "checkpoint-500")
    checkpoint(tmp_path, 9, missing="trainer_state.json")
    before = listing(tmp_path)
    hf_trainer(tiny_llama(), tmp_path, [PruningCallback(recipe())])
    assert listing(tmp_path) == before
    train(tmp_path)  # no resume was asked for
    assert {name: content for name, content in listing(tmp_path).items() if name in before} == before


def test_a_training_resumes_past_half_written_checkpoints(tmp_path: Path) -> None:
    whole = train(tmp_path, seed=0)
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "checkpoint-10" / SIDE_FILE).unlink()
    tiny_llama().save_pretrained(tmp_path / "checkpoint-500")
    last = get_last_checkpoint(str(tmp_path))
    assert str(last).endswith("checkpoint-500")
    resumed = train(tmp_path, resume=last)
    assert_same_weights(whole.model, resumed.model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (10, 12, 5, 500)]
    assert undone(tmp_path / "checkpoint-12") is None  # written anew
