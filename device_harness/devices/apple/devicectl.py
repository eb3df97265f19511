"""Asks ``xcrun devicectl`` which iPhones are there; what it answers is no more than text."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from device_harness.devices.device import Reachable
from device_harness.errors import DeviceError
from device_harness.plain_text import plain
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json

PAGE: Final = "docs/devices/apple.md"
OLDEST_IOS: Final = 17
"""The first iOS for which Xcode builds coremltools' runner."""

_LARGEST_ANSWER: Final = 4 << 20
_LIST_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 1.6
_TYPES: Final = ("iphone", "ipad")
NAME: Final = re.compile(r"[0-9A-Za-z-]{4,64}")


@dataclass(frozen=True)
class Phone:
    """An iPhone or iPad, as ``devicectl`` describes it.

    Attributes:
        udid: its UDID.
        identifier: CoreDevice's own name for it.
        title: what its owner calls it.
        model: its marketing name, or its type, such as ``iPhone16,1``.
        ios: the version of its system.
        build: the build of its system.
        processor: the kind of its CPU.
        state: of the tunnel to it: ``connected``, ``disconnected``, ``unavailable``, ...
        developer: the status of developer mode: ``enabled`` or ``disabled``.
    """

    udid: str
    identifier: str
    title: str
    model: str
    ios: str
    build: str
    processor: str
    state: str
    developer: str

    @property
    def problem(self) -> tuple[str, str] | None:
        """Why it cannot be used now and what to do, or None."""
        major = self.ios.partition(".")[0]
        if not major.isdigit() or int(major) < OLDEST_IOS:
            return (
                f"iOS {self.ios or 'of no known version'}",
                f"update it to iOS {OLDEST_IOS} or later, which coremltools' runner needs",
            )
        if self.developer != "enabled":
            return (
                "developer mode is off",
                "turn Settings > Privacy & Security > Developer Mode on, and restart it",
            )
        if self.state != "connected":
            return (
                f"its tunnel is {self.state or 'not known'}",
                "connect it by a cable, unlock it, trust this Mac, and open it once in Xcode's "
                "Devices and Simulators",
            )
        return None


def on_a_mac() -> bool:
    """Whether this machine is a Mac."""
    return sys.platform == "darwin"


def find_ios() -> list[Reachable]:
    """The iPhones that are there, within two seconds; without a Mac, why there can be none."""
    if not on_a_mac():
        return [
            Reachable(
                "ios",
                False,
                "an iPhone is reached from a Mac with Xcode, and this machine is none",
                f"connect it to a Mac and run the commands of {PAGE} there",
            )
        ]
    if shutil.which("xcrun") is None:
        return [
            Reachable(
                "ios",
                False,
                "xcrun is not installed",
                "install Xcode, and its command line tools by `xcode-select --install`",
            )
        ]
    try:
        phones = list_phones(_LOOK_SECONDS)
    except DeviceError as error:
        return [
            Reachable("ios", False, str(error), "run `xcrun devicectl list devices` to see why")
        ]
    if not phones:
        return [
            Reachable(
                "ios",
                False,
                "no iPhone is paired with this Mac",
                "connect one by a cable, unlock it and trust this Mac",
            )
        ]
    found = []
    for phone in phones:
        what, problem = f"{phone.model}, iOS {phone.ios}", phone.problem
        name = f"ios:{phone.udid}"
        if problem is None:
            found.append(Reachable(name, True, what))
        else:
            found.append(Reachable(name, False, f"{what}: {problem[0]}", problem[1]))
    return found


def list_phones(seconds: float = _LIST_SECONDS) -> list[Phone]:
    """Returns the iPhones and iPads that this Mac knows.

    Args:
        seconds: how long ``devicectl`` may take.

    Raises:
        DeviceError: it is missing, fails, takes too long, or answers what it never should.
    """
    with tempfile.TemporaryDirectory(prefix="edgeforge-devicectl-") as folder:
        answer = Path(folder) / "devices.json"
        command = ["xcrun", "devicectl", "list", "devices", "--json-output", str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
        except FileNotFoundError:
            raise DeviceError("xcrun is not installed: install Xcode") from None
        except subprocess.TimeoutExpired:
            raise DeviceError(f"devicectl did not answer within {seconds:g} s") from None
        if done.returncode:
            lines = done.stderr[-2000:].decode(errors="replace").split("\n")
            said = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise DeviceError(f"devicectl failed (exit code {done.returncode}): {plain(said)}")
        try:
            return read_phones(read_input(answer, _LARGEST_ANSWER))
        except OSError as error:
            raise DeviceError(f"devicectl wrote no answer: {error.strerror or error}") from error


def read_phones(content: bytes) -> list[Phone]:
    """Reads the JSON of ``devicectl list devices``; other kinds of devices are left out.

    Raises:
        DeviceError: it is no such answer, or it names a device by what no name can be.
    """
    try:
        data = parse_json(content, strict=False)
    except JsonError as error:
        raise DeviceError(f"devicectl's answer {error}") from error
    result = data.get("result") if isinstance(data, dict) else None
    rows = result.get("devices") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DeviceError("devicectl's answer lists no devices")
    phones = []
    for row in rows:
        hardware, device = _part(row, "hardwareProperties"), _part(row, "deviceProperties")
        if _text(hardware, "deviceType").lower() not in _TYPES:
            continue
        udid, identifier = _text(hardware, "udid"), _text(row, "identifier")
        # Both are pasted into shell lines by coremltools.
        if not (NAME.fullmatch(udid) and NAME.fullmatch(identifier)):
            raise DeviceError(f"devicectl names a device {plain(f'{udid} {identifier}')!r}")
        phones.append(
            Phone(
                udid=udid,
                identifier=identifier,
                title=_text(device, "name"),
                model=_text(hardware, "marketingName") or _text(hardware, "productType"),
                ios=_text(device, "osVersionNumber"),
                build=_text(device, "osBuildUpdate"),
                processor=_text(_part(hardware, "cpuType"), "name"),
                state=_text(_part(row, "connectionProperties"), "tunnelState").lower(),
                developer=_text(device, "developerModeStatus").lower(),
            )
        )
    return phones


def choose_phone(udid: str) -> Phone:
    """Returns the phone of a UDID, or the only one that is ready.

    Raises:
        DeviceError: there is no such phone, it is not ready, or several are and none was named.
    """
    if not on_a_mac():
        (found,) = find_ios()
        raise DeviceError(f"{found.what}: {found.cure}")
    phones = list_phones()
    if udid:
        chosen = [phone for phone in phones if udid in (phone.udid, phone.identifier)]
        if not chosen:
            known = ", ".join(phone.udid for phone in phones) or "none"
            raise DeviceError(f"there is no iPhone {plain(udid)!r} here; there are: {known}")
    else:
        ready = [phone for phone in phones if phone.problem is None]
        chosen = ready or phones
    if not chosen:
        raise DeviceError("no iPhone is paired with this Mac: connect one by a cable and trust it")
    if len(chosen) > 1:
        names = ", ".join(f"ios:{phone.udid} ({phone.model})" for phone in chosen)
        raise DeviceError(f"there are {len(chosen)} iPhones: name one of {names}")
    problem = chosen[0].problem
    if problem is not None:
        raise DeviceError(f"ios:{chosen[0].udid}: {problem[0]}: {problem[1]}")
    return chosen[0]


def _part(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return plain(value) if isinstance(value, str) else ""
