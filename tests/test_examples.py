"""Every script in examples/ runs at a small size, and says what it is there to show."""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHOWN = {
    "lightning_gradual": "sparsity of the targets: 0.700",
    "huggingface_gradual": "zeros in a saved weight: 0.600",
    "structured_oneshot": "opened: 3 blocks, 120 FFN units",
    "recovery_lora": "zeros after the merge: 0.500, all kept: True",
    "instruction_conditioned": "FFN units: 192 -> 64",
    "trl_exec": "zeros in a saved weight: 0.700",
}
LONG = {"trl_exec"}  # starts a process that imports TRL
MARKS = {name: pytest.mark.long if name in LONG else pytest.mark.slow for name in SHOWN}
WITHOUT_STEPS = {"structured_oneshot"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in SHOWN])
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "trl_exec" and find_spec("trl") is None:
        pytest.skip("needs trl")
    monkeypatch.chdir(tmp_path)
    for variable, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(sys, "argv", [name, *([] if name in WITHOUT_STEPS else ["--steps", "8"])])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SHOWN[name] in capsys.readouterr().out


def test_every_example_is_tried_and_named() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWN)
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in SHOWN if f"`{name}.py`" not in page] == []
