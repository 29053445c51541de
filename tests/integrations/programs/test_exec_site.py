"""The `sitecustomize` module of exec, in the interpreter below the virtual environment, without lightning_prune."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prune.integrations.programs import exec_inject

SITE = Path(exec_inject.__file__).parent / "exec_site"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def fake_home(tmp_path: Path) -> Path:
    """Return a folder with a trainer module and a stand-in for the library, reached through the environment only."""
    package = tmp_path / "home" / "lightning_prune" / "integrations" / "programs"
    package.mkdir(parents=True)
    written(
        package / "exec_inject.py",
        "def add_callback(name, construct, trainer, args, kwargs):\n"
        "    return args, kwargs | {'callbacks': [name, construct.__qualname__]}\n",
    )
    (tmp_path / "program").mkdir()
    written(
        tmp_path / "program" / "some_trainer.py",
        "class Trainer:\n    def __init__(self, *, callbacks=()):\n        self.callbacks = callbacks\n",
    )
    return tmp_path


def run_bare(folder: Path, text: str, *, recipe: str | None) -> str:
    """Run a program in the base interpreter with `exec_site` and the folder `program` on its path."""
    environment = {
        "PYTHONPATH": f"{SITE}:{folder / 'program'}",
        "LIGHTNING_PRUNE_EXEC_MODULES": "some_trainer:other",
        "LIGHTNING_PRUNE_EXEC_HOME": str(folder / "home"),
    } | ({} if recipe is None else {"LIGHTNING_PRUNE_EXEC_RECIPE": recipe})
    base = getattr(sys, "_base_executable", sys.executable)
    result = subprocess.run(
        [base, "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_trainer_module_is_wrapped_once_imported(fake_home: Path) -> None:
    text = "import inspect, some_trainer as t; print(t.Trainer().callbacks, inspect.signature(t.Trainer))"
    assert run_bare(fake_home, text, recipe="x") == "['some_trainer', 'Trainer.__init__'] (*, callbacks=())\n"


def test_nothing_is_wrapped_without_the_recipe(fake_home: Path) -> None:
    assert run_bare(fake_home, "import some_trainer as t; print(t.Trainer().callbacks)", recipe=None) == "()\n"


def test_hidden_sitecustomize_runs(fake_home: Path) -> None:
    written(fake_home / "program" / "sitecustomize.py", "import sys; seen = list(sys.path)")
    text = "import sys, sitecustomize; print(sitecustomize.seen == sys.path[1:], 'exec_site' in str(sys.path))"
    assert run_bare(fake_home, text, recipe="x") == "True False\n"
