import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_prune.integrations.programs import exec_process
from lightning_prune.integrations.programs.exec_process import run_process

# Imported on its own, which is quicker by the time it takes to import torch.
# Started from a shell's background, the tests would hand down that interrupts are ignored.
RUN_PROCESS = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(Path(exec_process.__file__).parent)!r})
from exec_process import run_process
sys.exit(run_process([sys.executable, *sys.argv[1:]], os.environ))
"""
# Counts the interrupts it gets while it waits, and ends with that number.
COUNT = """
import signal, time
interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(time.monotonic()))
print("ready", flush=True)
until = time.monotonic() + 20
while not interrupts and time.monotonic() < until:
    time.sleep(0.01)
time.sleep(0.3)
raise SystemExit(40 + len(interrupts))
"""
# Runs a Python program in a terminal of its own, and types Ctrl-C when it is ready.
TYPE_INTERRUPT = """
import os, pty, sys
child, terminal = pty.fork()
if not child:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while b"ready" not in os.read(terminal, 1000):
    pass
os.write(terminal, bytes([3]))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc; other systems forward signals alike"
)


@pytest.mark.parametrize(("text", "code"), [("", 0), ("exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9)])
def test_exit_code(text: str, code: int) -> None:
    assert run_process([sys.executable, "-c", text], os.environ) == code


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_process([sys.executable, "-c", ""], os.environ)
    assert signal.getsignal(signal.SIGTERM) == before


def start(folder: Path, before: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program below `run_process`, without a terminal, and return the parent and the program's id.

    The program runs a text, says who it is, and sleeps.
    """
    identity = folder / "identity"
    program = folder / "sleep.py"
    program.write_text(
        f"import os, pathlib, time\n{before}\n"
        f"pathlib.Path({str(folder / 'new')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(folder / 'new')!r}, {str(identity)!r})\ntime.sleep(60)\n",
    )
    parent = subprocess.Popen([sys.executable, "-c", RUN_PROCESS, str(program)], start_new_session=True)
    wait_until(identity.exists)
    return parent, int(identity.read_text())


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_running(identity: int) -> bool:
    try:
        status = Path(f"/proc/{identity}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@linux
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_reaches_the_program(tmp_path: Path, signum: signal.Signals) -> None:
    before = f"import signal\nsignal.signal({int(signum)}, lambda *_: exit(50))"
    parent, identity = start(tmp_path, before)
    parent.send_signal(signum)
    assert parent.wait(timeout=20) == 50
    assert not is_running(identity)


@linux
def test_program_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    parent, identity = start(tmp_path, "")
    assert is_running(identity)
    parent.kill()
    parent.wait(timeout=20)
    wait_until(lambda: not is_running(identity))


@linux
def test_interrupt_from_the_terminal_arrives_once(tmp_path: Path) -> None:
    program = tmp_path / "count.py"
    program.write_text(COUNT)
    command = [sys.executable, "-c", TYPE_INTERRUPT, "-c", RUN_PROCESS, str(program)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 41
