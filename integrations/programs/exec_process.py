"""Run one child process that gets the signals sent to this one, and that does not outlive it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

__all__ = ["run_process"]

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def run_process(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end.

    Args:
        argv: the executable and its arguments.
        environment: its whole environment.

    Returns:
        Its exit code, 128 + n if signal n ended it.
    """
    with (
        _forwarded_signals() as started,
        subprocess.Popen(argv, env=environment, preexec_fn=_parent_death_hook()) as child,
    ):
        started(child)
        code = child.wait()
    return 128 - code if code < 0 else code


def _parent_death_hook() -> Callable[[], None] | None:
    """Return what the child calls before it becomes the program, so that Linux ends it when this process is killed.

    The signal is SIGTERM, not SIGKILL: torchrun and accelerate end their workers on the one, and orphan them on the
    other.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def hook() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Pass signals on to a child process instead of acting on them.

    Yields:
        A function to name the child with; signals that came earlier reach it then.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and _is_foreground():
            return
        if child is None:
            early.append(signum)
        else:
            child.send_signal(signum)

    def started(process: subprocess.Popen[bytes]) -> None:
        nonlocal child
        child = process
        for signum in early:
            child.send_signal(signum)

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python handles signals there only
        signums = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
        before = {n: signal.signal(n, forward) for n in signums if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield started
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _is_foreground() -> bool:
    """Return whether the terminal's Ctrl-C reaches this process and, with it, the child in the same process group."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)
