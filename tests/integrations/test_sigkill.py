"""Kill a training process with SIGKILL, start it again as a user would, and compare with one that was never killed.

The processes are forked from a server that has imported the trainers, so that a start costs no seconds.
"""

import multiprocessing
import os
import random
import runpy
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import training_programs as programs
from safetensors.torch import load_file
from training_programs import differences, with_callback, zeros

pytestmark = pytest.mark.skipif(
    find_spec("lightning") is None
    or find_spec("transformers") is None
    or "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="needs the extras lightning and hf, and a forkserver",
)
ADAPTERS = "lightning_prune.integrations"
NUM_STEPS = 24
MAX_KILLS = 3


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    """Return a context whose processes start with the trainers imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_programs", f"{ADAPTERS}.hf_trainer", f"{ADAPTERS}.lightning_trainer"])
    return context


def run_program(program: str, out: str, printed: str) -> None:
    """Run a program in this process as `python PROGRAM OUT --resume last` would."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(printed, "a", buffering=1)  # noqa: SIM115
    sys.argv = [program, out, "--resume", "last"]
    runpy.run_path(program, run_name="__main__")


class Killer:
    """Starts a program again and again, and kills it at the moments it is given."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, program: Path) -> None:
        self.context = context
        self.program = program

    def run(self, out: Path, *moments: Callable[[str], bool]) -> int:
        """Run the program to its end, killed once at each moment; return the number of kills that hit it alive."""
        kills = sum(self._start_and_kill(out, moment) for moment in moments)
        process = self._start(out)
        process.join(60)
        assert process.exitcode == 0, self.printed(out)
        return kills

    def printed(self, out: Path) -> str:
        path = out.with_suffix(".log")
        return path.read_text() if path.exists() else ""

    def _start(self, out: Path) -> BaseProcess:
        process = self.context.Process(target=run_program, args=(str(self.program), str(out), str(out.with_suffix(".log"))))
        process.start()
        return process

    def _start_and_kill(self, out: Path, moment: Callable[[str], bool]) -> bool:
        seen = len(self.printed(out))
        process = self._start(out)
        while process.is_alive() and not moment(self.printed(out)[seen:]):
            time.sleep(0.0005)
        process.kill()
        process.join(60)
        assert process.exitcode in (0, -9), self.printed(out)
        return process.exitcode == -9
