"""The service ``sync``, versions 1 and 2: files and folders (AOSP: ``adb/SYNC.TXT``)."""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from device_harness.virtual_phone.commands import Commands, place_of
from device_harness.virtual_phone.faults import Faults
from device_harness.virtual_phone.link import Stream

_LARGEST_PATH: Final = 1024 + 16
_PIECE: Final = 64 << 10
_SHELL_USER: Final = 2000
_DRY_RUN: Final = 0x80000000
_HEAD: Final = struct.Struct("<4sI")
_STATUS: Final = struct.Struct("<IQQIIIIQqqq")
_NO_SPACE: Final = "No space left on device"


class Sync:
    """Reads and writes the phone's files for clients.

    Args:
        commands: whose root folder the files are in.
        faults: the faults to show.

    Attributes:
        received: how many bytes of files have arrived in all.
    """

    def __init__(self, commands: Commands, faults: Faults) -> None:
        self._root, self._faults = commands.root, faults
        self.received = 0

    async def serve(self, stream: Stream, _: str) -> None:
        """Answers requests until the client quits."""
        while True:
            name, length = _HEAD.unpack(await stream.exactly(_HEAD.size))
            if name == b"QUIT" or length > _LARGEST_PATH:
                return
            path = os.fsdecode(await stream.exactly(length))
            try:
                if not await self._answer(stream, name, path):
                    await _refuse(stream, f"unknown request {name!r}")
                    return
            except OSError as error:
                if isinstance(error, ConnectionError):
                    raise
                await _refuse(stream, os.strerror(error.errno or 5))

    async def _answer(self, stream: Stream, name: bytes, path: str) -> bool:
        if name in (b"STA2", b"LST2"):
            await stream.write(name + _status(self._root, path, follow=name == b"STA2"))
        elif name == b"STAT":
            await stream.write(name + _short_status(self._root, path))
        elif name in (b"LIST", b"LIS2"):
            await stream.write(_listing(self._root, path, name == b"LIS2"))
        elif name == b"SEND":
            path, _, mode = path.rpartition(",")
            await self._receive(stream, path, int(mode) if mode.isdecimal() else 0o644)
        elif name == b"SND2":
            _, mode_2, flags = struct.unpack("<4sII", await stream.exactly(12))
            await self._receive(stream, path, mode_2, dry_run=bool(flags & _DRY_RUN))
        elif name in (b"RECV", b"RCV2"):
            if name == b"RCV2":
                await stream.exactly(8)
            await self._send(stream, path)
        else:
            return False
        return True

    async def _send(self, stream: Stream, path: str) -> None:
        with place_of(self._root, path).open("rb") as file:
            while data := file.read(_PIECE):
                await stream.write(b"DATA" + struct.pack("<I", len(data)) + data)
        await stream.write(b"DONE" + bytes(4))

    async def _receive(
        self, stream: Stream, path: str, mode: int, *, dry_run: bool = False
    ) -> None:
        """Writes a file beside its place, and moves it there when it is whole."""
        target = place_of(self._root, path, follow=False)
        beside = target.with_name(f"{target.name[:200]}.partial")
        is_link = stat.S_ISLNK(mode)
        link, refusal, file = b"", "", None
        try:
            if not dry_run and not is_link:
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file = beside.open("wb")
                except OSError as error:
                    refusal = f"couldn't create file: {os.strerror(error.errno or 5)}"
            while True:
                name, size = _HEAD.unpack(await stream.exactly(_HEAD.size))
                if name == b"DONE":
                    break
                if name != b"DATA" or size > _PIECE:
                    raise ConnectionResetError("the client sends what is no piece of a file")
                data = await stream.exactly(size)
                if is_link:
                    link += data[:_LARGEST_PATH]
                elif file is not None and not refusal:
                    refusal = self._keep(file, data)
            if file is not None and not refusal:
                file.close()
                os.chmod(beside, mode & 0o777)
                os.utime(beside, (size, size))
                beside.replace(target)
            elif link and not dry_run:
                target.unlink(missing_ok=True)
                target.symlink_to(os.fsdecode(link.rstrip(b"\0")))
        finally:
            if file is not None:
                file.close()
                beside.unlink(missing_ok=True)
        if refusal:
            await _refuse(stream, refusal)
        else:
            await stream.write(b"OKAY" + bytes(4))

    def _keep(self, file: BinaryIO, data: bytes) -> str:
        """Writes a piece of a file; returns why not, where it cannot."""
        full, kept = self._faults.get("disk-full"), self._faults.get("lies")
        if full is not None and self.received + len(data) > full:
            return f"write failed: {_NO_SPACE}"
        self.received += len(data)
        if kept is not None:
            data = data[: max(0, kept - file.tell())]
        try:
            file.write(data)
        except OSError as error:
            return f"write failed: {os.strerror(error.errno or 5)}"
        return ""


async def _refuse(stream: Stream, words: str) -> None:
    await stream.write(b"FAIL" + struct.pack("<I", len(words.encode())) + words.encode())


def _status(root: Path, name: str, follow: bool) -> bytes:
    """What version 2 says of a file; where there is none, why."""
    try:
        path = place_of(root, name, follow)
        found = path.stat() if follow else path.lstat()
    except OSError as error:
        return _STATUS.pack(error.errno or 2, *[0] * 10)
    times = int(found.st_atime), int(found.st_mtime), int(found.st_ctime)
    owner = _SHELL_USER, _SHELL_USER
    kind = found.st_dev, found.st_ino, found.st_mode, found.st_nlink
    return _STATUS.pack(0, *kind, *owner, found.st_size, *times)


def _short_status(root: Path, name: str) -> bytes:
    """What version 1 says of a file; zeros where there is none."""
    try:
        found = place_of(root, name, follow=False).lstat()
    except OSError:
        return bytes(12)
    size = min(found.st_size, 0xFFFFFFFF)
    return struct.pack("<3I", found.st_mode, size, int(found.st_mtime) & 0xFFFFFFFF)


def _listing(root: Path, name: str, second: bool) -> bytes:
    entries = []
    with suppress(OSError):
        for path in sorted(place_of(root, name).iterdir()):
            called = os.fsencode(path.name)
            inside = f"{name}/{path.name}"
            kind, status = b"DENT", _short_status(root, inside)
            if second:
                kind, status = b"DNT2", _status(root, inside, follow=False)
            entries.append(kind + status + struct.pack("<I", len(called)) + called)
    return b"".join(entries) + b"DONE" + bytes(_STATUS.size + 4 if second else 16)
