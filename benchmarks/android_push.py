"""A push of 1 GB to the virtual phone that is cut in the middle: what is sent, and for how long.

    python benchmarks/android_push.py

It needs the extra ``android`` and 3 GB below the folder for temporary files, which it gives back.
The phone runs this host's commands, so that nothing is emulated; seconds are of this machine.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from device_harness.devices.android.archive import CHUNK, Archive
from device_harness.devices.android.phone import Phone
from device_harness.devices.android.transfer import install
from device_harness.virtual_phone.commands import HostCommands
from device_harness.virtual_phone.phone import VirtualPhone

_STEP = 1 << 20


def main() -> None:
    """Pushes, cuts, pushes again, and prints what was sent."""
    parser = argparse.ArgumentParser(description="Push a large file to the virtual phone.")
    parser.add_argument("--bytes", type=int, default=1_000_000_000, help="how large it is")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeforge-push-") as folder:
        _use_an_adb_of_its_own(Path(folder))
        try:
            _push(Path(folder), asked.bytes)
        finally:
            _adb("kill-server")


def _push(folder: Path, size: int) -> None:
    file = folder / "large"
    _write(file, size)
    with VirtualPhone(HostCommands(folder / "phone")) as virtual:
        phone = Phone(virtual.serial)
        started = time.monotonic()
        archive = Archive({"large": file})
        print(f"{len(archive.chunks)} chunks, digests in {time.monotonic() - started:.1f} s")
        virtual.set_fault("cut", size // 2)
        started = time.monotonic()
        install(phone, archive, "1 GB")
        twice = phone.sent - archive.size
        print(
            f"cut in the middle: {time.monotonic() - started:.1f} s, {phone.sent} bytes sent for "
            f"{archive.size}: {twice} twice, a chunk has {CHUNK}"
        )
        assert virtual.faults.get("cut") is None and twice <= CHUNK + 100 * len(archive.chunks)
        before, started = phone.sent, time.monotonic()
        install(phone, archive, "1 GB")
        print(f"unchanged: {time.monotonic() - started:.1f} s, {phone.sent - before} bytes sent")
        assert phone.sent == before


def _write(file: Path, size: int) -> None:
    """Writes a file whose parts all differ, though hardly any of it takes space on the disk."""
    with file.open("wb") as content:
        for at in range(0, size, _STEP):
            content.seek(at)
            content.write(at.to_bytes(8, "little"))
        content.truncate(size)


def _use_an_adb_of_its_own(folder: Path) -> None:
    (folder / "home").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "HOME": str(folder / "home"),
        "ANDROID_ADB_SERVER_PORT": str(port),
        "ADB_USB": "0",
        "ADB_LIBUSB": "0",
    }


def _adb(*arguments: str) -> None:
    from adbutils import adb_path

    subprocess.run([adb_path(), *arguments], check=False)


if __name__ == "__main__":
    main()
