"""The adb server of this host: which phones it knows, and what is amiss with each."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass, replace
from typing import Final

from device_harness.devices.android.device_text import clean, one_line
from device_harness.devices.device import Reachable
from device_harness.errors import DeviceError

_PORT_VARIABLE: Final = "ANDROID_ADB_SERVER_PORT"
_DEFAULT_PORT: Final = 5037
_ANSWER_SECONDS: Final = 0.4
_START_SECONDS: Final = 30.0
_LARGEST_ANSWER: Final = 0xFFFF
# What adb calls phones: a serial number, HOST:PORT, or a service's name on the local network.
_SERIAL: Final = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:\[\]%@+-]{0,127}")
_ADDRESS: Final = re.compile(r".+:[0-9]{1,5}")
INSTALL: Final = "pip install 'edgeforge[android]'"
_CURES: Final = {
    "unauthorized": "unlock the phone and answer 'Allow USB debugging' with yes",
    "authorizing": "unlock the phone and answer 'Allow USB debugging' with yes",
    "offline": "unplug the phone and plug it in again, or run `adb reconnect offline`",
    "connecting": "wait a moment, and run it again",
    "no permissions": "give your user the right to use the USB device, by your system's udev rules",
    "recovery": "let the phone start Android",
    "bootloader": "let the phone start Android",
    "sideload": "let the phone start Android",
    "rescue": "let the phone start Android",
}


@dataclass(frozen=True)
class Listed:
    """A phone that the adb server knows.

    Attributes:
        serial: its name for adb.
        state: ``device`` where it can be used.
        model: what the server was told that it is; empty where it was told nothing.
    """

    serial: str
    state: str
    model: str = ""

    @property
    def ready(self) -> bool:
        """Whether it can be used now."""
        return self.state == "device"

    @property
    def cure(self) -> str:
        """What to do about its state."""
        return _CURES.get(self.state, "let the phone start Android, and plug it in again")


def server_port() -> int:
    """The port of the adb server.

    Raises:
        DeviceError: the environment names no port.
    """
    given = os.environ.get(_PORT_VARIABLE, "").strip()
    if not given:
        return _DEFAULT_PORT
    if not (given.isascii() and given.isdigit()) or not 0 < int(given) < 65536:
        raise DeviceError(f"{_PORT_VARIABLE}={one_line(given, 40)} is no port: unset it")
    return int(given)


def listed_phones(port: int) -> list[Listed] | None:
    """The phones that the adb server knows; None where no server runs. It starts none.

    Raises:
        DeviceError: what answers on the port is no adb server.
    """
    asked = b"host:devices-l"
    try:
        with socket.create_connection(("127.0.0.1", port), _ANSWER_SECONDS) as line:
            line.sendall(b"%04x" % len(asked) + asked)
            head = read_exactly(line, 8)
            size = int(head[4:], 16) if head[:4] == b"OKAY" else -1
            if not 0 <= size <= _LARGEST_ANSWER:
                raise ValueError("no answer of adb's")
            text = clean(read_exactly(line, size))
    except ConnectionRefusedError:
        return None
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"port {port} of this host does not answer as an adb server does: end what listens "
            f"there, or set {_PORT_VARIABLE} to another port"
        ) from error
    return [found for line_ in text.splitlines() if (found := _listed(line_)) is not None]


def read_exactly(line: socket.socket, count: int) -> bytes:
    """That many bytes of a line.

    Raises:
        OSError: the line ended before, or fails.
    """
    found = bytearray()
    while len(found) < count:
        piece = line.recv(count - len(found))
        if not piece:
            raise ConnectionResetError("the line ended early")
        found += piece
    return bytes(found)


def _listed(line: str) -> Listed | None:
    """Reads a line of ``adb devices -l``.

    >>> _listed("R58M12  device usb:1-1 product:p model:Pixel_9 device:d transport_id:1")
    Listed(serial='R58M12', state='device', model='Pixel 9')
    """
    words = line.split()
    if len(words) < 2 or not _SERIAL.fullmatch(words[0]):
        return None
    state = "no permissions" if words[1] == "no" else words[1]  # adb explains it in a sentence
    models = [word.removeprefix("model:") for word in words[2:] if word.startswith("model:")]
    return Listed(words[0], state, models[0].replace("_", " ")[:80] if models else "")


def find_android() -> list[Reachable]:
    """What ``edgeforge devices`` tells of phones; it asks the adb server and starts none."""
    return [
        replace(each, cure=f"{each.cure[:1].upper()}{each.cure[1:]}." if each.cure else "")
        for each in _found()
    ]


def _found() -> list[Reachable]:
    from importlib.util import find_spec

    if find_spec("adbutils") is None:
        cure = f"install it: {INSTALL}"
        return [Reachable("android", False, "the package adbutils is not installed", cure)]
    try:
        port = server_port()
        phones = listed_phones(port)
    except DeviceError as error:
        what, _, cure = str(error).partition(": ")
        return [Reachable("android", False, what, cure)]
    if phones is None:
        cure = "plug a phone in that has USB debugging on, and use --device android, or adb devices"
        return [Reachable("android", False, f"no adb server runs on port {port}", cure)]
    if not phones:
        return [Reachable("android", False, "adb knows no phone", _PLUG_IN)]
    return [
        Reachable(
            f"android:{phone.serial}",
            phone.ready,
            (phone.model or "a phone") if phone.ready else f"adb says: {phone.state}",
            "" if phone.ready else phone.cure,
        )
        for phone in phones
    ]


_PLUG_IN: Final = "switch USB debugging on (developer options) and plug the phone in"


def start_server(port: int) -> None:
    """Starts the adb server.

    Raises:
        DeviceError: there is no adb here, or it does not start.
    """
    from adbutils import adb_path
    from adbutils.errors import AdbError

    try:
        program = adb_path()
        done = subprocess.run(
            [program, "-P", str(port), "start-server"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_START_SECONDS,
            check=False,
        )
    except AdbError as error:
        raise DeviceError(f"no adb was found: {INSTALL}, or put adb into PATH") from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"{program} start-server took longer than {_START_SECONDS:.0f} s: run it by hand"
        ) from error
    except OSError as error:
        raise DeviceError(f"{program} cannot be started: {error.strerror}") from error
    if done.returncode:
        raise DeviceError(f"{program} start-server failed: {one_line(done.stderr)}")


def choose_phone(serial: str) -> Listed:
    """The phone of a serial number, or the only one; the adb server is started if none runs.

    Args:
        serial: as adb names it; empty for that of ``$ANDROID_SERIAL``, or else the only phone.

    Raises:
        DeviceError: there is no such phone, there are several, or it cannot be used now.
    """
    from importlib.util import find_spec

    if find_spec("adbutils") is None:
        raise DeviceError(f"android needs the package adbutils: {INSTALL}")
    serial = serial or os.environ.get("ANDROID_SERIAL", "")
    if serial and not _SERIAL.fullmatch(serial):
        raise DeviceError(
            f"{one_line(serial, 80)!r} is no serial number of a phone: see `edgeforge devices`"
        )
    port = server_port()
    phones = listed_phones(port)
    if phones is None:
        start_server(port)
        phones = listed_phones(port) or []
    if _ADDRESS.fullmatch(serial) and serial not in {phone.serial for phone in phones}:
        _connect(port, serial)
        phones = listed_phones(port) or []
    chosen = [phone for phone in phones if serial in ("", phone.serial)]
    names = ", ".join(f"android:{phone.serial}" for phone in phones)
    if not chosen and serial:
        known = f"adb knows {names}" if names else "adb knows no phone"
        raise DeviceError(f"adb knows no phone {serial}; {known}: {_PLUG_IN}")
    if not chosen:
        raise DeviceError(f"adb knows no phone: {_PLUG_IN}")
    if len(chosen) > 1:
        raise DeviceError(f"adb knows {len(chosen)} phones: say which one, of {names}")
    if not chosen[0].ready:
        raise DeviceError(
            f"android:{chosen[0].serial} is {chosen[0].state}, says adb: {chosen[0].cure}"
        )
    return chosen[0]


def _connect(port: int, address: str) -> None:
    """As ``adb connect``; what comes of it is seen in the list of phones."""
    from adbutils import AdbClient
    from adbutils.errors import AdbError

    try:
        AdbClient("127.0.0.1", port).connect(address, timeout=15.0)
    except (AdbError, OSError, ValueError) as error:
        raise DeviceError(f"adb cannot connect to {address}: {one_line(str(error))}") from error
