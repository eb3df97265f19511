"""Serves one artifact of a module in a process of its own, because a runtime may end its process.

It reads and answers frames as `device_harness.worker` does. It opens the artifact at the request
``load``; ``run`` calls it once, and ``timed`` again and again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from device_harness.errors import DeviceError
from device_harness.frames import DTYPES, Array
from device_harness.memory import resident_peak
from device_harness.module_run import Arrays, ModuleFile, Opened, open_module
from device_harness.worker import Answer, answer_all, take_stdout
from exporters.modules.manifest import ModuleManifest

MOST_CALLS: Final = 100
"""Calls of a timed run behind the first, at most."""
ENOUGH_SECONDS: Final = 0.5
"""After so long a timed run ends, with at least one call behind the first."""


def main() -> None:
    """Serves the artifact named on the command line until stdin ends."""
    parser = argparse.ArgumentParser(prog="device_harness.module_worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    server = Server(asked.folder, asked.threads)
    try:
        answer_all(server.answer, resident_peak, sys.stdin.buffer, take_stdout())
    except BrokenPipeError:
        sys.exit(1)


class Server:
    """Does what requests ask for.

    Args:
        folder: the artifact.
        threads: the runtime's number of threads; None for its default.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        manifest = ModuleManifest.read(folder)
        self._target, self._threads = manifest.target, threads
        self._file = ModuleFile(
            folder / manifest.entry, tuple(manifest.inputs), tuple(manifest.outputs)
        )
        self._opened: Opened | None = None

    def answer(self, words: Mapping[str, Any], arrays: Sequence[Array]) -> Answer:
        """Answers one request."""
        if words["call"] == "load":
            return self._load(), ()
        assert self._opened is not None, "it is loaded first"
        inputs = dict(zip(self._file.inputs, arrays, strict=True))
        if words["call"] == "run":
            return {}, self._sendable(self._opened.run(inputs))
        seconds, outputs = _timed(self._opened, inputs)
        return {"seconds": seconds}, self._sendable(outputs)

    def _load(self) -> dict[str, object]:
        self._opened = open_module(self._target, self._file, self._threads)
        return {
            "seconds": self._opened.seconds,
            "runtime": self._opened.runtime,
            "limits": list(self._opened.limits),
        }

    def _sendable(self, outputs: Arrays) -> list[Array]:
        """The outputs in their order.

        Raises:
            DeviceError: one has a dtype that no module here gives.
        """
        for name, array in outputs.items():
            if array.dtype.name not in DTYPES and array.dtype != np.float16:
                raise DeviceError(
                    f"the output {name} is {array.dtype}: {', '.join(DTYPES)} are read"
                )
        found = [outputs[name] for name in self._file.outputs]
        return [each.astype(np.float32) if each.dtype == np.float16 else each for each in found]


def _timed(opened: Opened, inputs: Arrays) -> tuple[list[float], Arrays]:
    """Calls the artifact again and again: the seconds of each call, and what the last one gave."""
    seconds: list[float] = []
    while True:
        started = time.perf_counter()
        outputs = opened.run(inputs)
        seconds.append(time.perf_counter() - started)
        if len(seconds) > MOST_CALLS or (len(seconds) > 1 and sum(seconds) > ENOUGH_SECONDS):
            return seconds, outputs


if __name__ == "__main__":
    main()
