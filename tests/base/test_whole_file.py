"""Files that are replaced whole, whatever happens while they are written."""

import errno
from pathlib import Path

import pytest

from lightning_prune.base.whole_file import written_aside


def test_a_file_changes_in_one_step_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with written_aside(path) as aside:
            aside.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_stays_and_no_part_of_the_new_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(type(error)), written_aside(path) as aside:
        aside.write_text("ha")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "state.json" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r"state\.json"), written_aside(tmp_path / "state.json") as aside:
        aside.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
