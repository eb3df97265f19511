"""An iPhone, whose Core ML packages are run by coremltools' own runner app."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from device_harness.child_process import python_command, python_environment
from device_harness.devices.apple.devicectl import choose_phone
from device_harness.devices.device import Condition, Facts, Place
from device_harness.devices.host import ProcessChannel
from device_harness.errors import DeviceError
from exporters.manifest import Manifest

LIMITS: Final = (
    "memory, temperature, clocks and battery: devicectl tells none of them",
    "the speed of an app's own loop: the runner times each call on the phone, without what lies "
    "between calls",
    "whether prefill hands its caches to decode: the runner keeps the states of each function "
    "apart, so that the text comes from decode alone, and prefill is timed beside it",
)


class IosDevice(Place):
    """An iPhone.

    Args:
        place: its UDID; empty for the only one that is ready.

    Raises:
        DeviceError: this machine is no Mac, or there is no such iPhone, or it is not ready.
    """

    limits: tuple[str, ...] = LIMITS

    def __init__(self, place: str = "") -> None:
        self._phone = choose_phone(place)
        self.name = f"ios:{self._phone.udid}"

    def facts(self) -> Facts:
        """What ``devicectl`` says of it."""
        phone = self._phone
        return Facts(
            name=self.name,
            kind="ios",
            model=phone.model,
            system=f"iOS {phone.ios} ({phone.build})",
            processor=phone.processor or "not known",
            more={"title": phone.title, "developer mode": phone.developer},
        )

    def condition(self) -> Condition:
        """Nothing is known of how it is."""
        return Condition(at=time.time())

    def start(self, folder: Path, manifest: Manifest, arguments: Sequence[str]) -> ProcessChannel:
        """Starts a worker on this Mac, which drives the runner on the phone.

        Raises:
            DeviceError: the artifact is no Core ML package.
        """
        if manifest.target != "coreml":
            raise DeviceError(
                f"{self.name} runs coreml artifacts, and {folder} is for {manifest.target}"
            )
        command = python_command(
            "device_harness.devices.apple.phone_worker",
            str(folder.absolute()),
            "--udid",
            self._phone.udid,
            *arguments,
        )
        return ProcessChannel(command, python_environment())
