"""An emulated arm64 core as a device."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from device_harness.child_process import PYTHON, python_command
from device_harness.devices.arm64.cores import CORES, Core
from device_harness.devices.arm64.executorch.place import find_executorch
from device_harness.devices.arm64.pins import read_pins
from device_harness.devices.arm64.root import SET_UP, Root, find_root, require_host
from device_harness.devices.device import Condition, Facts, Place, Reachable
from device_harness.devices.device import Core as CoreFacts
from device_harness.devices.host import ProcessChannel
from device_harness.errors import DeviceError
from device_harness.executorch_shim import VARIABLE as EXECUTORCH
from exporters.manifest import Manifest
from quant.suggestion import did_you_mean

DEFAULT_CORE = "cortex-a76"


class Arm64Device(Place):
    """A core that qemu emulates, in the root folder that was set up.

    Args:
        place: the core's name; empty for `DEFAULT_CORE`.

    Raises:
        DeviceError: there is no such core.
    """

    def __init__(self, place: str = "") -> None:
        self.core = core_of(place)
        self.name = f"arm64:{self.core.name}"
        self.limits = limits_of(self.core)

    def facts(self) -> Facts:
        """What is known of it."""
        root = find_root()
        return Facts(
            name=self.name,
            kind="arm64",
            model=f"{self.core.name} (emulated by qemu)",
            system=f"Debian's arm64 Python on {platform.system()} {platform.release()}",
            processor=self.core.name,
            cores=tuple(CoreFacts(f"cpu{at}") for at in range(processors_of(root, self.core))),
            emulated=True,
            more={"architecture": self.core.architecture, "kernels": self.core.kernels},
        )

    def condition(self) -> Condition:
        """When it was asked; an emulated core has no clock and no temperature."""
        return Condition(at=time.time())

    def start(self, folder: Path, manifest: Manifest, arguments: Sequence[str]) -> ProcessChannel:
        """Starts a worker on an artifact."""
        require_host()
        root = find_root()
        command = python_command("device_harness.worker", str(folder.absolute()), *arguments)
        python = [*root.command(self.core.name), *python_of(root)]
        return ProcessChannel(
            [*python, *command[1:]], environment_in(root, python, manifest.target)
        )


def find_arm64() -> list[Reachable]:
    """The cores, and whether the root is set up; it starts nothing."""
    names = [f"arm64:{name}" for name in CORES]
    try:
        require_host()
    except DeviceError as error:
        what, _, cure = str(error).partition(": ")
        return [Reachable("arm64", False, what, f"{cure[:1].upper()}{cure[1:]}.")]
    try:
        find_root()
    except DeviceError as error:
        what = str(error).rpartition(": ")[0]
        return [Reachable("arm64", False, what, f"Run `{SET_UP}` once.")]
    return [
        Reachable(name, True, f"{core.architecture}, emulated: {_phones(core)}")
        for name, core in zip(names, CORES.values(), strict=True)
    ]


def core_of(place: str) -> Core:
    """The core of a device's name.

    Raises:
        DeviceError: there is none.
    """
    name = place or DEFAULT_CORE
    if name not in CORES:
        raise DeviceError(
            f"there is no emulated core {name[:40]!r}{did_you_mean(name, CORES)}; known: "
            f"{', '.join(CORES)}"
        )
    return CORES[name]


def limits_of(core: Core) -> tuple[str, ...]:
    """What running an artifact on an emulated core cannot tell."""
    emulated = (
        f"arm64:{core.name} is emulated: its kernels give what the core's would, and neither its "
        f"times nor its memory are a phone's."
    )
    if core.is_real:
        return (emulated,)
    return emulated, f"{core.name} is no real core: no phone has all that it has."


def with_kleidiai(
    arguments: Sequence[str], target: str, kleidiai: str | None, device: str
) -> list[str]:
    """A worker's arguments with the choice of kernels among the runtime's options.

    Raises:
        DeviceError: the target's runtime has no such choice.
    """
    given = list(arguments)
    if kleidiai is None:
        return given
    if target != "onnx":
        raise DeviceError(
            f"--kleidiai is a choice of onnxruntime, and {device} is given an artifact for "
            f"{target}: leave it out"
        )
    if "--options" not in given:
        given += ["--options", "{}"]
    at = given.index("--options") + 1
    given[at] = json.dumps({**json.loads(given[at]), "kleidiai": kleidiai})
    return given


def python_of(root: Root) -> list[str]:
    """The arm64 Python, without the packages of any system."""
    return [str(root.python), "-S", "-B"]


def environment_in(root: Root, python: Sequence[str], target: str) -> dict[str, str]:
    """The environment of the arm64 Python: nothing of the host's that leads it elsewhere.

    Args:
        root: where it is.
        python: the command that starts it.
        target: whose artifact runs.

    Raises:
        SetupError: the target's runtime is not set up.
    """
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "PATH") if name in os.environ}
    found = {
        **kept,
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": str(root.site),
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
        PYTHON: json.dumps(list(python)),
    }
    if target == "executorch":
        found[EXECUTORCH] = str(find_executorch(read_pins()))
    return found


def processors_of(root: Root, core: Core) -> int:
    """How many processors programs see there."""
    return (root.core(core.name) / "proc/cpuinfo").read_text().count("processor\t:")


def _phones(core: Core) -> str:
    return core.phones if core.is_real else "no real core, all that qemu has"
