"""A folder is written whole or not at all."""

import json
import stat
from pathlib import Path

import pytest

from lightning_prune.export.folder import check_free, new_folder, write_note
from lightning_prune.types import Report, TargetReport

REPORT = Report(
    step=4,
    targets=(TargetReport("a.weight", (2, 4), 8, 4), TargetReport("b.weight", (2, 2), 4, 1)),
    num_parameters=20,
    num_nonzeros=15,
    num_bytes=80,
    num_bytes_nonzero=60,
    flops_per_token=24,
    flops_per_token_nonzero=14,
)


def test_the_name_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
        assert folder.parent == out.parent
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "x"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="half-way"), new_folder(out) as folder:
        (folder / "file").write_text("x")
        raise RuntimeError("half-way")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
    assert (out / "file").exists()


def test_permissions_are_those_of_a_plain_mkdir(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty; nothing was overwritten"), new_folder(tmp_path):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match="is a file"):
        check_free(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "x"


def test_a_folder_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not empty"), new_folder(out):
        out.mkdir()
        (out / "theirs").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "theirs").read_text() == "x"


def test_note_says_what_holds(tmp_path: Path) -> None:
    write_note(tmp_path, report=REPORT, recipe={"seed": 3})
    note = json.loads((tmp_path / "sparsity.json").read_text())
    assert len(note.pop("program")) == 32
    assert note == {
        "version": 1,
        "sparsity": 5 / 12,
        "model_sparsity": 0.25,
        "num_parameters": 20,
        "num_nonzeros": 15,
        "targets": {"a.weight": 0.5, "b.weight": 0.25},
        "recipe": {"seed": 3},
    }


def test_no_note_without_anything_to_say(tmp_path: Path) -> None:
    write_note(tmp_path, report=None, recipe=None)
    assert list(tmp_path.iterdir()) == []
