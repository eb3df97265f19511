"""`AndroidDevice`: runs artifacts on a phone over adb."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from device_harness.child_process import PYTHON as OWN_PYTHON
from device_harness.devices.android.archive import Archive
from device_harness.devices.android.bundle import (
    LOADER,
    PYTHON,
    files_below,
    runtime_files,
    worker_files,
)
from device_harness.devices.android.phone import Phone
from device_harness.devices.android.process import PhoneProcess, sweep
from device_harness.devices.android.readings import read_condition, read_facts
from device_harness.devices.android.transfer import HOME, install
from device_harness.devices.arm64.executorch.place import find_executorch
from device_harness.devices.arm64.pins import read_pins
from device_harness.devices.arm64.root import find_root
from device_harness.devices.device import Condition, Facts, Place
from device_harness.errors import DeviceError
from device_harness.executorch_shim import VARIABLE as EXECUTORCH
from exporters.manifest import MANIFEST, Manifest

TARGETS: Final = ("onnx", "executorch")
_ABI: Final = "arm64-v8a"
_OTHERS: Final = {"armeabi-v7a": "a 32-bit arm processor", "x86": "an x86 processor"}
_EMULATED: Final = (
    "the phone's processor is emulated: seconds and tokens/s there say nothing of a real phone",
    "memory there is that of the emulator, which holds more than a phone's process",
)


class AndroidDevice(Place):
    """A phone.

    Args:
        place: its serial number for adb; empty for the only phone.

    Raises:
        DeviceError: there is no such phone, it cannot be used now, or runs no arm64 programs.
    """

    def __init__(self, place: str = "") -> None:
        self.phone = Phone(place)
        self.name = self.phone.name
        self._processes: list[PhoneProcess] = []
        self.phone.require_shell()
        self._facts = read_facts(self.phone)
        abi = self._facts.more.get("abi", "")
        if abi != _ABI:
            what = next((text for name, text in _OTHERS.items() if abi.startswith(name)), "")
            raise DeviceError(
                f"{self.name} has {what or 'an unknown processor'} ({abi or 'no abi'}), and what "
                f"runs artifacts there is for {_ABI}: use a phone with a 64-bit arm processor and "
                f"system"
            )

    @property
    def limits(self) -> tuple[str, ...]:
        """What running an artifact there cannot tell, one sentence each."""
        return _EMULATED if self._facts.emulated else ()

    @property
    def sent_bytes(self) -> int:
        """Bytes of files that were sent to it since it was opened."""
        return self.phone.sent

    def facts(self) -> Facts:
        """What is known of it."""
        return self._facts

    def condition(self) -> Condition:
        """How it is now."""
        return read_condition(self.phone)

    def start(self, folder: Path, manifest: Manifest, arguments: Sequence[str]) -> PhoneProcess:
        """Puts an artifact there, if it is not there yet, and starts a worker on it."""
        if manifest.target not in TARGETS:
            raise DeviceError(
                f"{manifest.target} artifacts do not run on {self.name}, which runs those for "
                f"{', '.join(TARGETS)}: export with --target {TARGETS[0]}"
            )
        root = find_root()
        executorch = find_executorch(read_pins()) if manifest.target == "executorch" else None
        sweep(self.phone)
        there = self.put_artifact(folder, manifest)
        runtime = self._put(Archive(runtime_files(root)), "the arm64 runtime")
        worker = self._put(Archive(worker_files()), "the worker")
        python = [f"{runtime}/{LOADER}", "--library-path", f"{runtime}/lib", f"{runtime}/{PYTHON}"]
        python += ["-B", "-s"]
        environment = {
            "PYTHONHOME": runtime,
            "PYTHONPATH": f"{runtime}/site:{worker}",
            "PYTHONUTF8": "1",
            "HOME": HOME,
            "TMPDIR": HOME,
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            OWN_PYTHON: json.dumps(python),
        }
        if executorch is not None:
            files = files_below(executorch)
            environment[EXECUTORCH] = self._put(Archive(files), "ExecuTorch's arm64 runtime")
        return self.run(
            [*python, "-P", "-m", "device_harness.worker", there, *arguments], environment
        )

    def put_artifact(self, folder: Path, manifest: Manifest) -> str:
        """Puts an artifact there, if it is not there yet; returns its folder there."""
        files = {name: folder / name for name in (*manifest.files, MANIFEST)}
        return self._put(Archive(files), f"the artifact {folder.name}")

    def put_files(self, files: dict[str, Path], what: str) -> str:
        """Puts files there, if they are not there yet; returns their folder there."""
        return self._put(Archive(files), what)

    def run(
        self, command: Sequence[str], environment: dict[str, str], folder: str = ""
    ) -> PhoneProcess:
        """Starts a program there; it ends with this device at the latest."""
        process = PhoneProcess(self.phone, command, environment, folder=folder)
        self._processes.append(process)
        return process

    def close(self) -> None:
        """Ends all that was started there."""
        while self._processes:
            self._processes.pop().close()

    def _put(self, archive: Archive, what: str) -> str:
        return install(self.phone, archive, what, self.tell)
