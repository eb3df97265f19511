"""An artifact of a module in a process of its own on this host; a crash there is one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from device_harness.child_process import python_command, python_environment
from device_harness.closing import Closing
from device_harness.devices.host import HostDevice, ProcessChannel
from device_harness.errors import DeviceError
from device_harness.frames import Array
from device_harness.session import Tokens
from device_harness.timed_run import TimedRun
from device_harness.worker_line import WorkerLine, shown_text
from exporters.modules.manifest import ModuleManifest

Arrays = dict[str, npt.NDArray[Any]]
_MOST_BYTES: Final = 1 << 36
_NO_ANSWER: Final = "the worker answers what no worker does"
_MOST_SECONDS: Final = 1e9


class ModuleSession(Closing):
    """An artifact of a module, opened in a worker; close it, or use it in a ``with`` statement.

    Args:
        folder: the artifact.
        threads: the runtime's number of threads; None for its default.
        timed_inputs: what `timed` gives it, by input name.

    Attributes:
        processor: empty: the runtimes do not say it.
        outputs: what the last call of `timed` gave, by output name; empty before.
    """

    processor: str = ""

    def __init__(
        self, folder: Path, threads: int | None = None, timed_inputs: Arrays | None = None
    ) -> None:
        manifest = ModuleManifest.read(folder)
        self.outputs: Arrays = {}
        self._folder, self._timed_inputs = folder, timed_inputs or {}
        self._inputs, self._outputs = tuple(manifest.inputs), tuple(manifest.outputs)
        self._facts: Mapping[str, Any] = {}
        arguments = [str(folder.absolute())]
        if threads is not None:
            arguments += ["--threads", str(threads)]
        command = python_command("device_harness.module_worker", *arguments)
        self._line = WorkerLine(HostDevice.name, ProcessChannel(command, python_environment()))

    def load(self) -> Mapping[str, Any]:
        """Opens the artifact in its runtime, once; the other calls do it when needed.

        Returns:
            ``seconds`` that it took, once the runtime was imported.

        Raises:
            DeviceError: the runtime is missing, refuses the artifact or crashes.
        """
        if not self._facts:
            words, _ = self._ask("load", f"opening {self._folder}", {})
            if not _is_time(words.get("seconds")) or not isinstance(words.get("limits"), list):
                raise DeviceError(_NO_ANSWER)
            self._facts = words
        return self._facts

    @property
    def runtime(self) -> str:
        """The runtime's name and version, for reports."""
        return shown_text(self.load().get("runtime", ""))

    @property
    def limits(self) -> tuple[str, ...]:
        """What a run here cannot tell of one on a device, one sentence each."""
        return tuple(map(shown_text, self.load()["limits"]))

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Calls the artifact.

        Args:
            inputs: by input name, of the dtypes and shapes that the manifest states.

        Raises:
            DeviceError: the runtime fails or crashes.
        """
        self.load()
        _, found = self._ask("run", f"running {self._folder}", inputs)
        return self._named(found)

    def timed(self, prompt: Tokens, output: int) -> TimedRun:
        """Calls the artifact with ``timed_inputs`` again and again, timed by the worker.

        Args:
            prompt: is not looked at: a module takes no tokens.
            output: is not looked at: a call is repeated as long as
                `device_harness.module_worker` says.

        Returns:
            The time of the first call as ``first_token_seconds`` and of the others as
            ``step_seconds``; no tokens.

        Raises:
            DeviceError: the runtime fails or crashes.
        """
        self.load()
        words, found = self._ask("timed", f"timed calls of {self._folder}", self._timed_inputs)
        seconds = words.get("seconds")
        if not isinstance(seconds, list) or len(seconds) < 2 or not all(map(_is_time, seconds)):
            raise DeviceError(_NO_ANSWER)
        self.outputs = self._named(found)
        return TimedRun(1, seconds[0], tuple(seconds[1:]), (), self._line.peak_bytes)

    def close(self) -> None:
        """Ends the worker; closing again does nothing."""
        self._line.close()

    def _named(self, found: list[Array]) -> Arrays:
        if len(found) != len(self._outputs):
            raise DeviceError(_NO_ANSWER)
        return dict(zip(self._outputs, found, strict=True))

    def _ask(
        self, call: str, what: str, inputs: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[dict[str, Any], list[Array]]:
        if self._line.is_closed:
            raise DeviceError("this session is closed: open the artifact again to run it")
        given = [np.asarray(inputs[name]) for name in self._inputs if name in inputs]
        return self._line.ask({"call": call}, given, _MOST_BYTES, what)


def _is_time(given: object) -> bool:
    return isinstance(given, int | float) and 0 <= given < _MOST_SECONDS
