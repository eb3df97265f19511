"""This Mac, on which Core ML artifacts run in Apple's own runtime, in a process of their own."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from device_harness.child_process import python_command, python_environment
from device_harness.devices.apple.devicectl import PAGE, on_a_mac
from device_harness.devices.device import Condition, Core, Facts, Place, Reachable
from device_harness.devices.host import ProcessChannel
from device_harness.errors import DeviceError
from device_harness.plain_text import plain
from exporters.manifest import Manifest

_SECONDS: Final = 3.0
LIMITS: Final = (
    "what an iPhone does: a Mac has other processors, more memory bandwidth and a fan",
    "which processor ran which operation: Core ML's compute plan says what it intends",
)


class MacDevice(Place):
    """This Mac.

    Args:
        place: empty; there is one.

    Raises:
        DeviceError: this machine is no Mac, coremltools is not installed, or a place was named.
    """

    name = "mac"
    limits: tuple[str, ...] = LIMITS

    def __init__(self, place: str = "") -> None:
        if place:
            raise DeviceError(f"there is one Mac, and no mac:{plain(place)}: use --device mac")
        (found,) = find_mac()
        if not found.ready:
            raise DeviceError(f"{found.what}: {found.cure}")

    def facts(self) -> Facts:
        """What ``sysctl`` says of this Mac."""
        said = sysctl("hw.model", "machdep.cpu.brand_string", "hw.memsize")
        memory = said.get("hw.memsize", "")
        levels = sysctl(
            *(f"hw.perflevel{at}.{key}" for at in range(2) for key in ("name", "physicalcpu"))
        )
        cores = [
            Core(f"{levels.get(f'hw.perflevel{at}.name', 'cpu').lower()}{number}")
            for at in range(2)
            for number in range(_count(levels.get(f"hw.perflevel{at}.physicalcpu", "")))
        ]
        return Facts(
            name=self.name,
            kind="mac",
            model=said.get("hw.model", platform.machine()),
            system=f"macOS {platform.mac_ver()[0]}",
            processor=said.get("machdep.cpu.brand_string", "not known"),
            cores=tuple(cores),
            memory_bytes=int(memory) if memory.isdigit() else None,
        )

    def condition(self) -> Condition:
        """How it is now, as far as ``pmset`` says."""
        battery = _output("pmset", "-g", "batt")
        percent = re.search(r"\b(\d{1,3})%", battery)
        return Condition(
            at=time.time(),
            battery_percent=int(percent[1]) if percent else None,
            charging="AC Power" in battery if battery else None,
        )

    def start(self, folder: Path, manifest: Manifest, arguments: Sequence[str]) -> ProcessChannel:
        """Starts a worker on an artifact, which opens it in Apple's runtime."""
        command = python_command("device_harness.worker", str(folder.absolute()), *arguments)
        return ProcessChannel(command, python_environment())


def find_mac() -> list[Reachable]:
    """Whether this machine is a Mac that runs Core ML."""
    if not on_a_mac():
        what = f"this machine is no Mac ({platform.system()})"
        return [Reachable("mac", False, what, f"run the commands of {PAGE} on a Mac")]
    if find_spec("coremltools") is None:
        cure = 'install it: pip install "edgeforge[coreml]"'
        return [Reachable("mac", False, "coremltools is not installed", cure)]
    return [Reachable("mac", True, f"this Mac, macOS {platform.mac_ver()[0]}")]


def sysctl(*names: str) -> dict[str, str]:
    """Returns what ``sysctl`` says, by name; names that it does not know are left out.

    Each is asked for alone, because one unknown name makes ``sysctl`` fail.
    """
    found = {name: plain(_output("sysctl", "-n", name).strip()) for name in names}
    return {name: text for name, text in found.items() if text}


def _count(text: str) -> int:
    return min(int(text), 256) if text.isdigit() else 0


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout[:65536].decode(errors="replace")
