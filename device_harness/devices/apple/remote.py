"""Builds, installs and calls coremltools' runner app on an iPhone.

This is the edge that needs a Mac, Xcode and a phone, and no developer of EdgeForge has any. It
wraps what coremltools 9 does for its ``MLModelBenchmarker`` with a device: ``modelrunner``, which
Xcode builds and signs, and messages as files that ``devicectl`` copies to and from the app. The
benchmarker itself feeds random inputs; here the inputs are a text.

coremltools pastes names into shell lines. So every name that reaches it is checked first: the
phone's, the signing team's, the app's, and the folder's.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from device_harness.devices.apple.devicectl import NAME, PAGE
from device_harness.devices.apple.phone_session import Arrays, Loaded
from device_harness.errors import DeviceError
from device_harness.plain_text import plain

TEAM: Final = "EDGEFORGE_APPLE_TEAM"
"""The environment variable with the team that signs the runner, ten letters and digits."""

BUNDLE: Final = "EDGEFORGE_APPLE_BUNDLE"
"""The environment variable with the runner's bundle identifier, where the team has one for it."""

ATTEMPTS: Final = 1200
"""How often an answer is looked for; Core ML may compile a model for minutes."""

POLL_SECONDS: Final = 0.5
"""The pause between two looks."""

LOOK_SECONDS: Final = 1.0
"""How often it is seen whether the app is still there."""

_ENDING_SECONDS: Final = 5.0
_PLAIN: Final = re.compile(r"[A-Za-z0-9._/-]+")
_TEAM: Final = re.compile(r"[A-Z0-9]{10}")
_BUNDLE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{2,154}")
_FOLDER: Final = "Documents/modelrunnerd"
_UNITS: Final = {
    "all": "ALL",
    "cpu": "CPU_ONLY",
    "cpu-and-gpu": "CPU_AND_GPU",
    "cpu-and-ne": "CPU_AND_NE",
}


class RemoteRunner:
    """coremltools' runner on an iPhone; see `device_harness.devices.apple.phone_session.Runner`.

    Args:
        package: the ``.mlpackage``.
        udid: the phone's UDID.
        units: compute units, a key of `device_harness.coreml_session.COMPUTE_UNITS`.

    Attributes:
        runtime: the runtime's name and version, for reports.
        prepared: the seconds of each step of getting ready, by name.

    Raises:
        DeviceError: a step fails, or a name is none that may be given to coremltools.
    """

    def __init__(self, package: Path, udid: str, units: str) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # else a bar of progress for every message
        import coremltools
        from coremltools.models.ml_program.experimental import remote_device

        self._remote: Any = remote_device
        self._units = getattr(coremltools.ComputeUnit, _UNITS[units])
        self._services: dict[str, Any] = {}
        self.prepared: Mapping[str, float] = {}
        self._event_loop = asyncio.Runner()
        self._folder = Path(tempfile.mkdtemp(prefix="edgeforge-phone-"))
        self._device: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if _PLAIN.fullmatch(str(self._folder)) is None:
                raise DeviceError(
                    f"the folder for temporary files, {plain(str(self._folder))}, has characters "
                    f"that coremltools would paste into a shell line: set TMPDIR to another"
                )
            find_devicectl()
            folder = self._folder
            self._compiled = self._timed("compiling", lambda: compile_package(package, folder))
            device = self._timed("finding", lambda: self._find(udid))
            self._device = self._install(device)
        except BaseException:
            self.close()
            raise
        self.runtime = (
            f"Core ML of iOS {plain(str(device.os_version))} (compute units: {units}), by "
            f"coremltools {coremltools.__version__}'s runner"
        )

    def load(self, function: str) -> Loaded:
        """Loads a function once more, with a state of its own."""
        several = function != "main"
        service = self._run(self._connect(function if several else None), f"loading {function}")
        self._services[service.model_id] = service
        nanoseconds = service.load_duration_in_nano_seconds
        return Loaded(service.model_id, _seconds(nanoseconds, f"loading {function}"))

    def call(self, key: str, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[Arrays, float]:
        """Calls a loaded function: its outputs, and the seconds that it took on the phone."""
        service = self._services[key]
        given = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        outputs: Arrays = self._run(service.predict(inputs=given), "a call")
        return outputs, _seconds(service.last_predict_duration_in_nano_seconds, "a call")

    def compute_plan(self, key: str) -> Mapping[str, Any]:
        """Returns the compute plan of a loaded function, as the runner sends it.

        `device_harness.devices.apple.compute_plan` reads it.
        """
        service = self._services[key]
        name, params = "MLModelService.ComputePlan", {"modelID": key}
        found, _ = self._run(service._service.call_method(name=name, params=params), "the plan")
        if not isinstance(found, Mapping):
            raise DeviceError("the runner's compute plan is none")
        return found

    def close(self) -> None:
        """Ends the runner and removes the files for it."""
        for service in self._services.values():
            # The app forgets them as it ends; else coremltools would send messages to nobody.
            service._state = self._remote._RemoteMLModelService.State.Unloaded
        self._services = {}
        if self._process is not None:
            end_app(self._process)
            self._process = None
        self._event_loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _find(self, udid: str) -> Any:
        for device in self._call(self._remote.Device.get_devices, "listing the devices"):
            if udid in (device.udid, device.identifier):
                for name in (device.udid, device.identifier):
                    if NAME.fullmatch(name) is None:
                        raise DeviceError(f"devicectl names a device {plain(name)!r}")
                return device
        raise DeviceError(f"the iPhone {plain(udid)} is not there any more: connect it again")

    def _install(self, device: Any) -> Any:
        """Builds the runner, installs and starts it; returns the device with its session."""
        team, bundle = os.environ.get(TEAM, ""), os.environ.get(BUNDLE) or None
        if team and _TEAM.fullmatch(team) is None:
            raise DeviceError(f"{TEAM} is {plain(team)!r}: a team is ten letters and digits")
        if bundle is not None and _BUNDLE.fullmatch(bundle) is None:
            raise DeviceError(f"{BUNDLE} is {plain(bundle)!r}: write it like com.example.runner")
        remote = self._remote
        credentials = remote.AppSigningCredentials(development_team=team, bundle_identifier=bundle)
        app = self._timed(
            "building",
            lambda: remote._ModelRunnerAppBuilder.build(
                device=device, build_directory=self._folder / "build", credentials=credentials
            ),
        )
        if app is None:
            raise DeviceError(f"Xcode built no runner: see {PAGE} for the team that signs it")
        installed = self._timed(
            "installing", lambda: remote._DeviceCtl.install_app(device=device, app_path=app)
        )
        if _BUNDLE.fullmatch(str(installed.bundle_identifier)) is None:
            raise DeviceError("devicectl installed an app whose identifier is none")
        files = self._folder / "messages"
        files.mkdir()
        self._process = self._timed(
            "starting", lambda: start_app(device.identifier, installed.bundle_identifier)
        )
        session = remote._AppSession(
            device=device,
            process=self._process,
            installation_info=installed,
            working_directory=files,
        )
        return replace(device, session=session)

    async def _connect(self, function: str | None) -> Any:
        remote = self._remote
        socket = remote._DeviceCtlSocket(device=self._device, source=_FOLDER)
        service = remote._RemoteMLModelService(
            service=remote._DeviceCtlRemoteService(
                socket=socket, poll_time=POLL_SECONDS, max_attempts=ATTEMPTS
            ),
            compiled_model_path=self._compiled,
            compute_units=self._units,
            function_name=function,
        )
        await service.load()
        return service

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = self._call(work, what)
        self.prepared = {**self.prepared, what: time.perf_counter() - started}
        return found

    def _run(self, work: Coroutine[Any, Any, Any], what: str) -> Any:
        return self._call(lambda: self._event_loop.run(self._watched(work, what)), what)

    async def _watched(self, work: Coroutine[Any, Any, Any], what: str) -> Any:
        """Awaits an answer as long as the app lives, which coremltools does not look at."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
            if not task.done() and not self._device.session.is_alive():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
                raise DeviceError(
                    f"the runner on the phone ended in {what}: keep the phone awake and unlocked, "
                    f"and run it again; where memory runs out iOS ends it, and a smaller artifact "
                    f"may do"
                )
        return task.result()

    @staticmethod
    def _call(work: Callable[[], Any], what: str) -> Any:
        """Does a step; coremltools' errors, which have no common class, become one sentence."""
        try:
            return work()
        except DeviceError:
            raise
        except Exception as error:
            words = str(error).split("\n")[0] or type(error).__name__
            raise DeviceError(f"coremltools failed in {what}: {plain(words)}") from error


def compile_package(package: Path, folder: Path) -> Path:
    """Compiles a package by Apple's compiler, which macOS has; returns the ``.mlmodelc``."""
    from coremltools.models.utils import compile_model

    # The package's own path may hold any characters; the compiled one is pasted into a shell line.
    return Path(compile_model(str(package), str(folder / "model.mlmodelc")))


def start_app(identifier: str, bundle: str) -> subprocess.Popen[bytes]:
    """Starts an installed app; it stays in this process's group and ends with it.

    coremltools would start it by a shell, and end that shell alone.
    """
    launch = ["xcrun", "devicectl", "device", "process", "launch", "--console"]
    return subprocess.Popen(
        [*launch, "-d", identifier, bundle],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def end_app(process: subprocess.Popen[bytes]) -> None:
    """Ends what `start_app` started: ``xcrun`` becomes ``devicectl``, which ends the app."""
    process.terminate()
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def find_devicectl() -> None:
    """Puts ``devicectl`` on the path: coremltools calls it by its bare name, Xcode by ``xcrun``.

    Raises:
        DeviceError: Xcode has none.
    """
    if shutil.which("devicectl") is not None:
        return
    found = None
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["xcrun", "--find", "devicectl"]
        done = subprocess.run(command, capture_output=True, timeout=20, check=False, text=True)
        found = shutil.which(done.stdout.strip()) if done.returncode == 0 else None
    if found is None:
        raise DeviceError("Xcode has no devicectl: install Xcode 15 or later")
    os.environ["PATH"] = f"{Path(found).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _seconds(nanoseconds: object, what: str) -> float:
    if type(nanoseconds) is not int or not 0 <= nanoseconds < 10**15:
        raise DeviceError(f"the runner does not say how long {what} took")
    return nanoseconds / 1e9
