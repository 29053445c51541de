import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_prune.cli import command as cli
from lightning_prune.integrations.programs import exec_inject
from lightning_prune.integrations.programs.exec_inject import (
    EXIT_NOT_AS_PROMISED,
    EXIT_NOT_PRUNED,
    add_callback,
    run_exec,
)
from lightning_prune.integrations.runs import pruning_run
from tests.integrations import training_programs as programs
from tests.integrations.training_programs import differences, exec_command, run, zeros
from tests.integrations.trainings import resumes_in_place

pytestmark = pytest.mark.skipif(
    find_spec("lightning") is None or find_spec("transformers") is None, reason="needs the extras lightning and hf"
)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(programs.TRANSFORMERS_RECIPE)
    return str(path)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def run_here(recipe: Path, *command: object, expected: int = 0) -> str:
    """Call `run_exec` in this process, which has torch already, and return what the program printed."""
    with tempfile.TemporaryFile("w+") as printed, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = os.dup(1), os.dup(2)
        try:
            for descriptor in (1, 2):
                os.dup2(printed.fileno(), descriptor)
            code = run_exec(str(recipe), [str(part) for part in command])
        finally:
            for descriptor, kept in zip((1, 2), before, strict=True):
                os.dup2(kept, descriptor)
                os.close(kept)
        printed.seek(0)
        text = printed.read()
    assert code == expected, text
    return text


# Lightning


@pytest.fixture(scope="module")
def lightning_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Lightning program, a recipe, and `whole`: what an uninterrupted run left."""
    folder = tmp_path_factory.mktemp("lightning")
    program = written(folder / "train.py", programs.LIGHTNING)
    recipe = written(folder / "recipe.yaml", programs.LIGHTNING_RECIPE)
    run_here(recipe, program, folder / "whole")
    return folder


def test_lightning_script_is_pruned(lightning_folder: Path) -> None:
    assert zeros(torch.load(lightning_folder / "whole" / "final.pt")) == {
        "layers.0.weight": 0.5,
        "layers.2.weight": 0.5,
    }


@pytest.mark.slow
@resumes_in_place
def test_lightning_script_resumes_exactly(lightning_folder: Path) -> None:
    moved = shutil.copy(lightning_folder / "whole" / "step=8.ckpt", lightning_folder / "moved.ckpt")
    command = (lightning_folder / "train.py", lightning_folder / "resumed", "--resume", moved)
    printed = run_here(lightning_folder / "recipe.yaml", *command)
    assert "step 7\n" not in printed
    assert "step 8\n" in printed
    whole, resumed = (torch.load(lightning_folder / name / "last.ckpt") for name in ("whole", "resumed"))
    assert differences(whole["state_dict"], resumed["state_dict"]) == []
    assert differences(whole["optimizer_states"], resumed["optimizer_states"]) == []
    states = [saved["callbacks"]["PruningCallback"]["sparsifier"] for saved in (whole, resumed)]
    notes, _ = zip(*((state.pop("notes"), state.pop("digest")) for state in states), strict=True)
    assert notes[0] == []
    assert [note.partition(",")[0] for note in notes[1]] == ["training resumes after batch 2 of 6 of an epoch"]
    assert differences(*states) == []


@pytest.mark.long
def test_ranks_that_lightning_starts_are_pruned(lightning_folder: Path) -> None:
    program = lightning_folder / "train.py"
    text = (
        program.read_text()
        .replace("if trainer.is_global_zero:", "if True:")
        .replace('"/final.pt"', 'f"/final{trainer.global_rank}.pt"')
    )
    both = written(lightning_folder / "both.py", text)
    out = lightning_folder / "ranks"
    run_here(lightning_folder / "recipe.yaml", both, out, "--devices", 2)
    first, second = (torch.load(out / f"final{rank}.pt") for rank in (0, 1))
    assert set(zeros(first).values()) == {0.5}
    assert differences(first, second) == []


@pytest.mark.long
def test_pytorch_lightning_script_is_pruned(lightning_folder: Path) -> None:
    if find_spec("pytorch_lightning") is None:
        pytest.skip("needs pytorch_lightning")
    text = programs.LIGHTNING.replace("lightning.pytorch.", "pytorch_lightning.").replace(
        "import lightning\n", "import pytorch_lightning as lightning\n"
    )
    program = written(lightning_folder / "older_name.py", text)
    out = lightning_folder / "older_name"
    run_here(lightning_folder / "recipe.yaml", program, out)
    expected = torch.load(lightning_folder / "whole" / "final.pt")
    assert differences(torch.load(out / "final.pt"), expected) == []


@pytest.mark.long
def test_lightning_cli_program_is_pruned(lightning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = programs.LIGHTNING.partition("if __name__")[0] + (
        "from lightning.pytorch.cli import LightningCLI\n"
        "class Data(lightning.LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return torch.utils.data.DataLoader([(torch.ones(8, 16), torch.ones(8, 8))] * 6, batch_size=None)\n"
        "cli = LightningCLI(Network, Data, save_config_callback=None)\n"
        "torch.save(cli.model.state_dict(), 'cli.pt')\n"
    )
    program = written(lightning_folder / "command.py", text)
    options = ("--trainer.max_steps=24", "--trainer.logger=false", "--trainer.accelerator=cpu")
    monkeypatch.chdir(lightning_folder)
    run_here(Path("recipe.yaml"), program, "fit", *options)
    assert set(zeros(torch.load(lightning_folder / "cli.pt")).values()) == {0.5}


# Transformers


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a transformers program, a recipe, and what an uninterrupted run with -m left and printed."""
    folder = tmp_path_factory.mktemp("transformers")
    written(folder / "program_of_mine.py", programs.TRANSFORMERS)
    written(folder / "recipe.yaml", programs.TRANSFORMERS_RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        written(folder / "printed", run_here(Path("recipe.yaml"), "-m", "program_of_mine", folder / "whole"))
    return folder


def final(folder: Path) -> dict[str, Any]:
    weights: dict[str, Any] = load_file(folder / "final" / "model.safetensors")
    return weights


@pytest.mark.slow
def test_module_is_pruned(transformers_folder: Path) -> None:
    sparsity = zeros(final(transformers_folder / "whole"))
    assert len(sparsity) == 2 * 7 + 2
    assert {name: value for name, value in sparsity.items() if value != 0.5} == {
        "lm_head.weight": 0.0,
        "model.embed_tokens.weight": 0.0,
    }


@pytest.mark.slow
def test_subclass_of_trainer_gets_one_callback(transformers_folder: Path) -> None:
    line = next(line for line in (transformers_folder / "printed").read_text().splitlines() if "callbacks" in line)
    assert line.split().count("PruningCallback") == 1


@pytest.mark.long
def test_transformers_script_resumes_exactly(transformers_folder: Path) -> None:
    whole, resumed = transformers_folder / "whole", transformers_folder / "resumed"
    moved = shutil.copytree(whole / "checkpoint-8", transformers_folder / "moved" / "checkpoint-8")
    program = transformers_folder / "program_of_mine.py"
    run_here(transformers_folder / "recipe.yaml", program, resumed, "--resume", moved)
    assert not (resumed / "checkpoint-8").exists()
    assert differences(final(whole), final(resumed)) == []
    for name in ("optimizer.pt", "lightning_prune.pt"):
        one, other = (torch.load(out / "checkpoint-24" / name, weights_only=True) for out in (whole, resumed))
        assert differences(one, other) == [], name


@pytest.mark.slow
def test_callback_of_the_program_itself_counts(transformers_folder: Path) -> None:
    quarter = written(transformers_folder / "quarter.yaml", programs.TRANSFORMERS_RECIPE.replace("0.5", "0.25"))
    text = programs.with_callback(programs.TRANSFORMERS, "lightning_prune.integrations.trainers.hf_trainer", quarter)
    program = written(transformers_folder / "own.py", text)
    out = transformers_folder / "own"
    printed = run_here(transformers_folder / "recipe.yaml", program, out)
    assert printed.split().count("PruningCallback") == 1
    assert set(zeros(final(out)).values()) == {0.25, 0.0}


@pytest.mark.slow
def test_trainer_that_never_trains_is_an_error(transformers_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = transformers_folder / "program_of_mine.py"
    run_here(transformers_folder / "recipe.yaml", program, "unused", "--no_train", expected=EXIT_NOT_PRUNED)
    assert "nothing was pruned" in caplog.text
    assert "did not train it" in caplog.text


@pytest.mark.slow
def test_workers_of_torchrun_are_pruned(transformers_folder: Path) -> None:
    launcher = Path(sys.executable).with_name("torchrun")
    out = transformers_folder / "inside"
    command = (launcher, "--standalone", "--nproc-per-node", 2, transformers_folder / "program_of_mine.py", out)
    printed = run_here(transformers_folder / "recipe.yaml", *command)
    assert printed.split().count("PruningCallback") == 2
    assert set(zeros(final(out)).values()) == {0.5, 0.0}


@pytest.mark.long
def test_exec_below_torchrun_is_pruned(transformers_folder: Path) -> None:
    out = transformers_folder / "outside"
    result = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *exec_command(transformers_folder / "recipe.yaml", transformers_folder / "program_of_mine.py", out),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split().count("PruningCallback") == 2
    assert set(zeros(final(out)).values()) == {0.5, 0.0}


@pytest.mark.long
def test_accelerate_launch_is_pruned(transformers_folder: Path) -> None:
    launcher = Path(sys.executable).with_name("accelerate")
    out = transformers_folder / "accelerate"
    command = (launcher, "launch", "--cpu", "--num_processes", 1, transformers_folder / "program_of_mine.py", out)
    run_here(transformers_folder / "recipe.yaml", *command)
    assert differences(final(out), final(transformers_folder / "whole")) == []


# Around the program


def test_bad_recipe_ends_before_the_program_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = written(tmp_path / "train.py", f"open({str(tmp_path / 'started')!r}, 'w')")
    bad = written(tmp_path / "bad.yaml", programs.LIGHTNING_RECIPE.replace("sparsity", "sparsty"))
    assert cli.main(["exec", "--recipe", str(bad), "--", str(program)]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert not (tmp_path / "started").exists()


def test_program_without_trainer_is_an_error_and_pays_nothing(
    tmp_path: Path, recipe: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    program = written(tmp_path / "train.py", "import sys; print(sys.path, 'torch' in sys.modules)")
    plain = run(program).stdout
    assert run_exec(recipe, [str(program)]) == EXIT_NOT_PRUNED
    assert capfd.readouterr().out == plain
    assert plain.endswith("False\n")
    assert "nothing was pruned" in caplog.text


@pytest.mark.parametrize(
    ("events", "code", "message"),
    [
        ("", EXIT_NOT_PRUNED, "no Trainer of transformers or Lightning was seen in it"),
        ("constructed", EXIT_NOT_PRUNED, "did not train it"),
        ("started\\ntrained", EXIT_NOT_AS_PROMISED, "a training began and its end was not seen"),
        ("trained", 0, ""),  # resumed where it had ended
        ("trained\\nended", 0, ""),
        ("trained\\nbroken half as sparse\\nended", EXIT_NOT_AS_PROMISED, "did not end as promised: half as sparse"),
        ("trained\\nended\\ntrained\\ninterrupted", EXIT_NOT_AS_PROMISED, "the last training was interrupted"),
        ("trained\\ninterrupted\\ntrained\\nended", 0, ""),
    ],
)
def test_only_a_training_that_ended_as_promised_counts(
    recipe: str, events: str, code: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"import os; open(os.environ['LIGHTNING_PRUNE_EXEC_MARKER'], 'a').write('{events}')"
    assert run_exec(recipe, ["-c", text]) == code
    assert message in caplog.text
    assert bool(caplog.text) == (code != 0)


@pytest.mark.parametrize(
    ("text", "code"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9), ("1 / 0", 1)]
)
def test_exit_code_is_passed_on(tmp_path: Path, recipe: str, text: str, code: int) -> None:
    assert run_exec(recipe, [str(written(tmp_path / "train.py", text))]) == code


def test_marker_is_removed(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    look = "import os; raise SystemExit(40 + os.path.isdir(os.path.dirname(os.environ['LIGHTNING_PRUNE_EXEC_MARKER'])))"
    assert run_exec(recipe, ["-c", look]) == 41
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "needs a command"),
        (["no-such-program", "x"], "no-such-program"),
        (["missing/train.py", "x"], r"there is no script missing/train\.py; name the file from the current folder"),
        (["-m"], "needs a module after -m"),
        (["-m", "no_such_package.train"], r"there is no module 'no_such_package' for -m no_such_package\.train"),
    ],
)
def test_command_that_cannot_run_is_refused(recipe: str, command: list[str], message: str) -> None:
    with pytest.raises((ValueError, ModuleNotFoundError), match=message):
        run_exec(recipe, command)


def test_a_module_in_the_current_folder_runs(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "own_program.py", "raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert run_exec(recipe, ["-m", "own_program"]) == 9


# Arguments of a Trainer


class FakeCallback:
    def __init__(self, recipe: str) -> None:
        self.recipe = recipe


def construct(self: object, model: object, callbacks: Any = None, **options: int) -> None:
    raise AssertionError("the arguments are only bound")


@pytest.fixture
def _fake_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(exec_inject, "_callback_class", lambda adapter: FakeCallback)
    monkeypatch.setenv("LIGHTNING_PRUNE_EXEC_RECIPE", "some/recipe")
    monkeypatch.setenv("LIGHTNING_PRUNE_EXEC_MARKER", str(tmp_path / "marker"))


def added(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return add_callback("transformers.trainer", construct, object(), args, kwargs)


@pytest.mark.usefixtures("_fake_adapter")
@pytest.mark.parametrize("others", [None, "one", ["one", "two"], ("one",)])
def test_callback_comes_after_those_of_the_program(others: Any) -> None:
    given = list(others) if isinstance(others, list | tuple) else [others] if others else []
    for args, kwargs in (added("model", others, rate=1), added("model", callbacks=others, rate=1)):
        assert args[0] == "model"
        callbacks = args[1]
        assert callbacks[:-1] == given
        assert callbacks[-1].recipe == "some/recipe"
        assert callbacks is not others
        assert kwargs == {"rate": 1}


@pytest.mark.usefixtures("_fake_adapter")
def test_callback_is_not_added_twice() -> None:
    own = FakeCallback("own")
    args, _ = added("model", [own])
    assert args[1] == [own]


@pytest.mark.usefixtures("_fake_adapter")
def test_wrong_arguments_are_left_to_the_trainer() -> None:
    assert added("model", [], "surplus", rate=1) == (("model", [], "surplus"), {"rate": 1})


# What a program below is told


def test_environment_of_the_program(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    found = exec_inject._environment("recipe.yaml", tmp_path / "marker")
    site = str(Path(exec_inject.__file__).resolve().parent / "exec_site")
    assert found["PYTHONPATH"] == os.pathsep.join([site, "/theirs"])
    assert found["LIGHTNING_PRUNE_EXEC_RECIPE"] == recipe  # another folder may be the program's
    assert found["LIGHTNING_PRUNE_EXEC_MARKER"] == str(tmp_path / "marker")
    assert "transformers.trainer" in found["LIGHTNING_PRUNE_EXEC_MODULES"].split(os.pathsep)
    assert (Path(found["LIGHTNING_PRUNE_EXEC_HOME"]) / "lightning_prune" / "recipe").is_dir()
    assert found["HOME"] == os.environ["HOME"]
    monkeypatch.delenv("PYTHONPATH")
    packaged = exec_inject._environment("train/gradual_magnitude", tmp_path / "marker")
    assert packaged["PYTHONPATH"] == site
    assert packaged["LIGHTNING_PRUNE_EXEC_RECIPE"] == "train/gradual_magnitude"


class FakeRun:
    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.is_training, self.broken = False, broken

    def start(self, model: int, *, total_steps: int) -> None:
        self.is_training = True

    def finish(self) -> None:
        self.is_training = False

    def check_again(self, model: object) -> None:
        self.broken += ("seen later",)

    def abort(self) -> bool:
        was_training, self.is_training = self.is_training, False
        return was_training


class FakeAdapter:
    def on_train_begin(self, number: int) -> int:
        return number


def test_callbacks_and_runs_mark_how_a_training_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setenv("LIGHTNING_PRUNE_EXEC_MARKER", str(marker))
    monkeypatch.setattr(pruning_run, "PruningRun", FakeRun)
    monkeypatch.setitem(sys.modules, "an_adapter", SimpleNamespace(PruningCallback=FakeAdapter))
    exec_inject._watch_runs.cache_clear()
    callback_class = exec_inject._callback_class(exec_inject._Adapter("an_adapter", "on_train_begin"))
    exec_inject._watch_runs.cache_clear()
    assert callback_class().on_train_begin(3) == 3
    one = FakeRun(("few zeros,\nas a \u201cstream\u201d ended", "no report"))
    one.start(1, total_steps=2)
    one.finish()
    one.check_again(None)
    other = FakeRun()
    other.start(1, total_steps=2)
    assert (other.abort(), other.abort()) == (True, False)
    assert marker.read_text(encoding="ascii").splitlines() == [
        "trained",
        "started",
        "broken few zeros, as a \\u201cstream\\u201d ended",
        "broken no report",
        "ended",
        "broken seen later",
        "started",
        "interrupted",
    ]
