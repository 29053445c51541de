"""Real processes that train together over gloo on this machine, kept between tests because they are slow to start."""

import multiprocessing
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch.distributed as dist

__all__ = ["Processes"]


class Processes:
    """A group of processes; use it as a context manager.

    An error ends the process it happens in, which prints its traceback, and with it the group, since the others may
    wait for it; the next `run` starts a new group.
    """

    def __init__(self, number: int = 2, *, seconds: float = 90.0, are_warnings_errors: bool = True) -> None:
        self.number, self.seconds = number, seconds
        self._filter = "error" if are_warnings_errors else "default"
        self._folder = tempfile.TemporaryDirectory(prefix="processes")
        self._num_groups = 0
        self._members: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function that can be imported in every process; return what each one returned, by rank."""
        if not self._members:
            self._start()
        ranks = {connection: rank for rank, (_, connection) in enumerate(self._members)}
        for connection in ranks:
            connection.send_bytes(pickle.dumps((function, args)))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self.seconds
        while len(answers) < self.number:
            waiting = [connection for connection, rank in ranks.items() if rank not in answers]
            ready = wait(waiting, timeout=deadline - time.monotonic())
            if not ready:
                self._end()
                pytest.fail(f"ranks did not answer within {self.seconds:g} s in {function.__name__}")
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    answers[ranks[connection]] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._end()
                    pytest.fail(f"rank {ranks[connection]} failed in {function.__name__}; its error stands in stderr")
        return [answers[rank] for rank in range(self.number)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._num_groups += 1
        meeting = Path(self._folder.name) / str(self._num_groups)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
        for rank in range(self.number):
            ours, theirs = context.Pipe()
            args = (rank, self.number, str(meeting), self._filter, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def _end(self) -> None:
        for process, connection in self._members:
            connection.close()
            process.join(timeout=1)
            process.kill()
            process.join()
        self._members.clear()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._folder.cleanup()


def _serve(rank: int, number: int, meeting: str, warning_filter: Any, connection: Connection) -> None:
    """Join the group and answer calls until the pipe is closed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter(warning_filter)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=number, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        function, args = pickle.loads(message)
        connection.send_bytes(pickle.dumps(function(*args)))
