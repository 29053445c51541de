"""Kill a training process with SIGKILL, start it again as a user would, and compare with one that was never killed.

The processes are forked from a server that has imported the trainers, so that a start does not take seconds.
"""

import multiprocessing
import random
import runpy
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations import training_programs as programs
from tests.integrations.training_programs import differences, with_callback, zeros
from tests.integrations.trainings import resumes_in_place

HAS_TRAINERS = find_spec("lightning") is not None and find_spec("transformers") is not None
HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
pytestmark = pytest.mark.skipif(
    not (HAS_TRAINERS and HAS_SERVER), reason="needs the extras lightning and hf, and a system that can fork"
)
HF_ADAPTER = "lightning_prune.integrations.trainers.hf_trainer"
LIGHTNING_ADAPTER = "lightning_prune.integrations.trainers.lightning_trainer"

Moment = Callable[[str], bool]


def run_program(program: str, out: str, log: str) -> None:
    """Run a program in this process as `python PROGRAM OUT --resume last` would."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    sys.argv = [program, out, "--resume", "last"]
    runpy.run_path(program, run_name="__main__")


class Training:
    """A program and what it leaves in a folder over one or more starts."""

    def __init__(self, context: BaseContext, program: Path, out: Path) -> None:
        self.context = context
        self.program = program
        self.out = out
        self.log = out.with_suffix(".log")
        self.log.touch()

    def start(self, kill_at: Moment | None = None) -> bool:
        """Run the program to its end, or to its end by SIGKILL at a moment; return whether it was killed."""
        arguments = (str(self.program), str(self.out), str(self.log))
        seen = len(self.log.read_text())
        process = self.context.Process(target=run_program, args=arguments)  # type: ignore[attr-defined]
        process.start()
        while kill_at is not None and process.is_alive():
            if kill_at(self.log.read_text()[seen:]):
                process.kill()
                break
            time.sleep(0.0005)
        process.join(60)
        assert process.exitcode in (0, -9), self.log.read_text()
        return bool(process.exitcode)


def after_steps(number: int, line: str, delay: float) -> Moment:
    """Return the moment some seconds after a process has printed a number of lines with a text in them."""
    reached = 0.0

    def is_now(printed: str) -> bool:
        nonlocal reached
        if not reached and printed.count(line) >= number:
            reached = time.monotonic()
        return bool(reached) and time.monotonic() - reached >= delay

    return is_now


def survive(training: Training, line: str, written: Path) -> None:
    """Kill a training before its first checkpoint, at a random moment, and while it writes a file; then let it end.

    The file belongs to the checkpoint of step 16 of 24; the last start may fall back to that of step 12.
    """
    rng = random.Random(0)
    moments = [
        after_steps(2, line, 0.0),
        after_steps(rng.randrange(5, 11), line, rng.uniform(0, 0.02)),
        lambda printed: written.exists(),
    ]
    for moment in moments:
        assert training.start(kill_at=moment), training.log.read_text()
    seen = len(training.log.read_text())
    assert not training.start()
    assert training.log.read_text()[seen:].count(line) in (24 - 16, 24 - 12)


@pytest.fixture(scope="module")
def context() -> BaseContext:
    """Return a context whose processes have the trainers imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, HF_ADAPTER, LIGHTNING_ADAPTER])
    return context


def trainings(folder: Path, context: BaseContext, text: str, adapter: str, recipe: str) -> tuple[Training, Training]:
    """Return two trainings of the same program, in folders of their own."""
    (folder / "recipe.yaml").write_text(recipe)
    program = folder / "train.py"
    program.write_text(with_callback(text, adapter, folder / "recipe.yaml"))
    return Training(context, program, folder / "whole"), Training(context, program, folder / "killed")


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_transformers_survives(tmp_path: Path, context: BaseContext) -> None:
    whole, killed = trainings(tmp_path, context, programs.TRANSFORMERS, HF_ADAPTER, programs.TRANSFORMERS_RECIPE)
    whole.start()
    survive(killed, "'loss'", killed.out / "checkpoint-16" / "model.safetensors")
    expected, weights = (load_file(run.out / "final" / "model.safetensors") for run in (whole, killed))
    assert set(zeros(weights).values()) == {0.0, 0.5}
    assert differences(expected, weights) == []
    for name in ("optimizer.pt", "lightning_prune.pt"):
        assert differences(*(loaded(run.out / "checkpoint-24" / name) for run in (whole, killed))) == [], name


@resumes_in_place
def test_lightning_survives(tmp_path: Path, context: BaseContext) -> None:
    whole, killed = trainings(tmp_path, context, programs.LIGHTNING, LIGHTNING_ADAPTER, programs.LIGHTNING_RECIPE)
    whole.start()
    survive(killed, "\nstep ", killed.out / "step=16.ckpt")
    expected, weights = (loaded(run.out / "final.pt") for run in (whole, killed))
    assert set(zeros(weights).values()) == {0.5}
    assert differences(expected, weights) == []
    one, other = (loaded(run.out / "last.ckpt") for run in (whole, killed))
    assert differences(one["optimizer_states"], other["optimizer_states"]) == []
    states = [saved["callbacks"]["PruningCallback"]["sparsifier"] for saved in (one, other)]
    notes, _ = zip(*((state.pop("notes"), state.pop("digest")) for state in states), strict=True)
    assert notes[0] == []
    assert all(note.startswith("training resumes after batch") for note in notes[1])
    assert differences(*states) == []
