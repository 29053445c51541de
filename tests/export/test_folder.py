"""A folder is written whole or not at all."""

import json
import stat
from pathlib import Path

import pytest

from lightning_prune.base.types import Report, TargetReport
from lightning_prune.export import folder as folders
from lightning_prune.export.folder import (
    FolderTakenError,
    check_file,
    check_free,
    check_writable,
    new_folder,
    write_note,
    write_plan_note,
)

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


RECIPE = {"seed": 3, "export": {"dir": "out", "overwrite": False}}


def exported(out: Path, monkeypatch: pytest.MonkeyPatch, *, by_this_program: bool = False) -> Path:
    """Write an export; of another program unless told otherwise."""
    with monkeypatch.context() as patch:
        if not by_this_program:
            patch.setattr(folders, "_PROGRAM", "another")
        with new_folder(out) as folder:
            (folder / "weights").write_text("old")
            write_note(folder, report=None, recipe=RECIPE)
    return out


def test_an_earlier_export_stays_unless_overwrite_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / "out", monkeypatch)
    with pytest.raises(FolderTakenError, match=r"or set export\.overwrite: true to replace this earlier export"):
        check_free(out)
    with pytest.raises(FolderTakenError, match=r"to replace this earlier export"):
        check_free(out, recipe=RECIPE | {"seed": 4})
    assert (out / "weights").read_text() == "old"
    with new_folder(out, overwrite=True) as folder:
        assert (out / "weights").read_text() == "old"  # until the new one is whole
        (folder / "new").write_text("x")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_recipe_is_told_that_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = exported(tmp_path / "out", monkeypatch)
    again = {"export": {"dir": "out", "overwrite": overwrite}, "seed": 3}
    with pytest.raises(FolderTakenError, match="what this same recipe wrote when it was finished, so there is nothing"):
        check_free(out, recipe=again)


def test_a_plan_note_marks_an_export_too(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        write_plan_note(folder, {"method": "x"})
    assert json.loads((tmp_path / "out" / "lightning_prune.json").read_text())["method"] == "x"
    assert check_free(tmp_path / "out") == tmp_path / "out"


def test_a_later_training_of_one_program_replaces_its_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / "out", monkeypatch, by_this_program=True)
    assert check_free(out, recipe=RECIPE) == out
    with pytest.raises(FolderTakenError, match="not empty"):
        check_free(out, recipe=RECIPE | {"seed": 4})
    with new_folder(out) as folder:
        (folder / "weights").write_text("of the second fold")
    assert (out / "weights").read_text() == "of the second fold"


@pytest.mark.parametrize("content", [None, "[]", "{", ""])
def test_overwrite_replaces_nothing_of_others(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "theirs").write_text("x")
    if content is not None:
        (tmp_path / "sparsity.json").write_text(content)
    with pytest.raises(
        FolderTakenError, match=r"replaces exports of this library only, and it holds no sparsity\.json"
    ):
        check_free(tmp_path, overwrite=True)


def test_an_overwritten_export_comes_back_when_the_new_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = exported(tmp_path / "out", monkeypatch)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"), new_folder(out, overwrite=True) as folder:
        (folder / "weights").write_text("new")
    assert (out / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_probed_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "deep" / "new")
    assert list((tmp_path / "deep" / "new").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot write into the folder .*file: .*; name a folder on a disk"):
        check_writable(tmp_path / "file")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="No space left on device; name a folder on a disk that can be written"):
        check_writable(tmp_path / "deep")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]


def test_a_file_for_results_can_be_written_or_is_refused(tmp_path: Path) -> None:
    assert check_file(tmp_path / "new" / "results.json") == tmp_path / "new" / "results.json"
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ValueError, match=r"new is a folder; name a file for the results, for example .*results\.json"):
        check_file(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write into the folder"):
        check_file(tmp_path / "file" / "results.json")
