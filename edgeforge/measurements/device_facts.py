"""What a measurement notes of a device, and of EdgeForge itself."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from device_harness.devices.device import Condition, Device, Facts
from device_harness.errors import DeviceError

_OWNERS: Final = ("title",)
"""Facts that are the owner's affair: what he calls his phone."""


def look(device: Device) -> Condition | None:
    """How a device is now; None where it cannot be asked."""
    try:
        return device.condition()
    except DeviceError:
        return None


def told(facts: Facts, name: str) -> dict[str, Any]:
    """A device's facts for a file that may be sent to others: named as the user did."""
    told = facts.as_json()
    more = {key: value for key, value in told["more"].items() if key not in _OWNERS}
    return {**told, "name": name, "more": more}


def edgeforge_version() -> str:
    """The version of EdgeForge that measures."""
    try:
        return version("edgeforge")
    except PackageNotFoundError:
        return "unknown"
