"""Kinds of devices by the name that ``--device`` takes.

To add a kind, add a file or a folder beside this one and a row to `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from device_harness.devices.android.device import TARGETS as ANDROID_TARGETS
from device_harness.devices.android.device import AndroidDevice
from device_harness.devices.android.server import find_android
from device_harness.devices.apple.devicectl import find_ios
from device_harness.devices.apple.iphone import IosDevice
from device_harness.devices.apple.mac import MacDevice, find_mac
from device_harness.devices.arm64.device import Arm64Device, find_arm64
from device_harness.devices.device import Device, Reachable
from device_harness.devices.host import HostDevice, find_host
from device_harness.devices.progress import Progress, no_progress
from device_harness.errors import DeviceError
from quant.suggestion import did_you_mean

DEFAULT = "host"
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Kind:
    """A kind of device.

    Attributes:
        open: opens one; takes what follows the colon of its name, an empty string for none, and
            the options by keyword.
        find: what of this kind is reachable now, and why others are not. It starts nothing and
            returns within a second or two.
        targets: the targets whose artifacts run there.
        options: the names of the options that ``open`` takes.
    """

    open: Callable[..., Device]
    find: Callable[[], list[Reachable]]
    targets: tuple[str, ...]
    options: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "host": Kind(HostDevice, find_host, ("onnx", "executorch", "coreml")),
    "arm64": Kind(Arm64Device, find_arm64, ("onnx", "executorch")),
    "android": Kind(AndroidDevice, find_android, ANDROID_TARGETS),
    "mac": Kind(MacDevice, find_mac, ("coreml",)),
    "ios": Kind(IosDevice, find_ios, ("coreml",)),
}


def kind_of(name: str) -> str:
    """The kind of a device, of its name.

    Raises:
        DeviceError: there is no such kind.
    """
    kind = name.partition(":")[0]
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise DeviceError(
            f"there is no device {name!r}{did_you_mean(kind, KINDS)}; known kinds: {known}"
        )
    return kind


def open_device(
    name: str,
    options: Mapping[str, str | None] | None = None,
    progress: Progress = no_progress,
) -> Device:
    """Opens a device; close it, or use it in a ``with``.

    Args:
        name: a kind, or a kind, a colon and which one: ``arm64:cortex-a76``.
        options: further options of the kind, by name; None as a value means the default.
        progress: is told how much of what is sent there has arrived, in bytes.

    Raises:
        DeviceError: there is no such device, it cannot be reached, or it has no such option.
    """
    kind = KINDS[kind_of(name)]
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise DeviceError(f"there is no device {name[:_LONGEST_NAME]!r}: see `edgeforge devices`")
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key in given:
        if key not in kind.options:
            raise DeviceError(f"{name} has no option --{key.replace('_', '-')}: leave it out")
    device = kind.open(name.partition(":")[2], **given)
    device.tell = progress
    return device


def find_devices() -> list[Reachable]:
    """What is reachable now, and why the rest is not, of every kind; all kinds look at once."""
    with ThreadPoolExecutor(len(KINDS)) as pool:
        found = pool.map(lambda kind: kind.find(), KINDS.values())
        return [each for rows in found for each in rows]
