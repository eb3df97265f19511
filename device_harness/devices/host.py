"""This host, on which each artifact runs in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import BinaryIO

from device_harness.child_process import python_command, python_environment
from device_harness.devices.device import Condition, Core, Facts, Place, Reachable
from device_harness.errors import DeviceError
from device_harness.memory import meminfo
from exporters.manifest import Manifest
from quant.processors import processor_name

_CPUS = Path("/sys/devices/system/cpu")
_ZONES = Path("/sys/class/thermal")


class ProcessChannel:
    """A process on this host, and all that it starts.

    Args:
        command: starts it.
        environment: of the process.
        folder: in which it runs; None for the current one.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
    ) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=dict(environment),
                cwd=folder,
                start_new_session=os.name == "posix",
            )
        except OSError as error:
            self._said.close()
            raise DeviceError(f"{command[0]} cannot be started: {error.strerror}") from error

    @property
    def requests(self) -> BinaryIO:
        """Its stdin."""
        assert self._process.stdin is not None
        return self._process.stdin  # type: ignore[return-value]

    @property
    def answers(self) -> BinaryIO:
        """Its stdout."""
        assert self._process.stdout is not None
        return self._process.stdout  # type: ignore[return-value]

    def wait(self, seconds: float) -> int | None:
        """Waits for its end: the exit code, negative for a signal; None if it still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self) -> str:
        """The end of what it printed on stderr."""
        if self._said.closed:
            return ""
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, end - 8192))
        return self._said.read().decode(errors="replace")

    def close(self) -> None:
        """Ends it and all that it started."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):  # closing flushes a request that an ended process never read
                stream.close()
        with suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(self._process.pid, SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        self._said.close()


class HostDevice(Place):
    """This host.

    Args:
        place: empty; there is one host.

    Raises:
        DeviceError: a place was named.
    """

    name = "host"
    limits: tuple[str, ...] = ()

    def __init__(self, place: str = "") -> None:
        if place:
            raise DeviceError(f"there is one host, and no host:{place}: use --device host")

    def facts(self) -> Facts:
        """What is known of this host."""
        return Facts(
            name=self.name,
            kind="host",
            model=platform.machine(),
            system=f"{platform.system()} {platform.release()}",
            processor=processor_name(),
            cores=tuple(_cores()),
            memory_bytes=meminfo("MemTotal"),
        )

    def condition(self) -> Condition:
        """How it is now, as far as Linux says."""
        return Condition(
            at=time.time(),
            temperatures=_temperatures(),
            governors=_each_core("cpufreq/scaling_governor"),
            clocks=_hertz("cpufreq/scaling_cur_freq"),
            clock_limits=_hertz("cpufreq/scaling_max_freq"),
            available_bytes=meminfo("MemAvailable"),
        )

    def start(self, folder: Path, manifest: Manifest, arguments: Sequence[str]) -> ProcessChannel:
        """Starts a worker on an artifact."""
        command = python_command("device_harness.worker", str(folder.absolute()), *arguments)
        return ProcessChannel(command, python_environment())


def find_host() -> list[Reachable]:
    """This host is always there."""
    return [Reachable("host", True, f"this machine, {processor_name()}")]


def _cores() -> list[Core]:
    limits = _hertz("cpufreq/cpuinfo_max_freq")
    return [Core(f"cpu{at}", limits.get(f"cpu{at}")) for at in range(os.cpu_count() or 1)]


def _each_core(name: str) -> dict[str, str]:
    """A file of each core's folder, by core."""
    found = {}
    for folder in sorted(_CPUS.glob("cpu[0-9]*")):
        with suppress(OSError):  # virtual machines have no such files
            found[folder.name] = (folder / name).read_text().strip()
    return found


def _hertz(name: str) -> dict[str, int]:
    """As `_each_core`, of clocks, which Linux gives in kilohertz."""
    return {core: 1000 * int(text) for core, text in _each_core(name).items() if text.isdigit()}


def _temperatures() -> dict[str, float]:
    found = {}
    for zone in sorted(_ZONES.glob("thermal_zone*")):
        with suppress(OSError, ValueError):
            name = (zone / "type").read_text().strip()
            found[f"{zone.name} {name}"] = int((zone / "temp").read_text()) / 1000
    return found
