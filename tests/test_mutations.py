"""The list of mechanisms that tests must notice the loss of names what is there."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / ".ci").glob("mutations*.py")))
def test_what_is_taken_away_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    module = importlib.import_module(name)
    for mutation in module.MUTATIONS:
        text = (ROOT / mutation.file).read_text(encoding="utf-8")
        assert mutation.code in text, f"{name}: {mutation.promise}: {mutation.file} has no {mutation.code!r}"
        tests = [word.partition("::")[0] for word in mutation.tests.split() if word.startswith("tests")]
        assert tests, f"{name}: {mutation.promise} names no test"
        assert all((ROOT / test).exists() for test in tests), f"{name}: {mutation.promise}: {tests}"
    for loaded in [one for one in sys.modules if one.startswith("mutation")]:
        monkeypatch.delitem(sys.modules, loaded)
