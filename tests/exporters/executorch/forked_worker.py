"""ExecuTorch's process, forked from one that has loaded the runtime already.

A process of its own imports torch first, which takes two seconds, where most tests' programs run
for a tenth of one. `tests/device_harness/test_executorch_session.py` starts the real ones.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from multiprocessing.reduction import DupFd
from typing import IO

from device_harness.executorch_worker import serve

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "tests.exporters.executorch.loaded_runtime"])


def serve_socket(
    file: str, weights: str, threads: int, connection: socket.socket, said: DupFd
) -> None:
    """What `device_harness.executorch_worker` does, over a socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    printed = said.detach()
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    serve(file, weights, threads, connection.makefile("rb"), connection.makefile("wb"))


class ForkedWorker:
    """Stands in for what `device_harness.executorch_session.start_worker` returns."""

    def __init__(self, file: str, weights: str, threads: int, said: IO[bytes]) -> None:
        ours, theirs = socket.socketpair()
        self._process = FORKS.Process(
            target=serve_socket,
            args=(file, weights, threads, theirs, _Passed(said.fileno())),
            daemon=True,
        )
        self._process.start()
        self._code: int | None = None
        theirs.close()
        self.pid = self._process.pid
        self.stdin, self.stdout = ours.makefile("wb"), ours.makefile("rb")
        ours.close()  # the files keep it open

    def kill(self) -> None:
        if self._code is None:
            self._process.kill()

    def wait(self) -> int:
        if self._code is None:
            self._process.join()
            self._code = self._process.exitcode
            self._process.close()
        assert self._code is not None
        return self._code


class _Passed:
    """A file's number that becomes the child's own when it is pickled."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self):
        return _same, (DupFd(self._number),)


def _same(passed: DupFd) -> DupFd:
    return passed
