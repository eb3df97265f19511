"""Opens what EdgeForge reads: regular files only, because a pipe or a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from functools import cache
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Final

_KINDS: Final = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
# Their files are made up as they are read: some never end, and none has the size that it states.
_KERNELS: Final = ("/proc", "/sys", "/sys/fs/cgroup")


class NotRegularError(OSError):
    """The path names something that is no regular file, which could not be read to its end."""


class TooLargeError(OSError):
    """The file has more bytes than EdgeForge reads of its kind."""


def open_input(path: Path) -> BufferedReader:
    """Opens a regular file for reading; links are followed.

    Raises:
        OSError: the file cannot be opened, or it is a folder, a pipe, a device, a socket or one of
            the kernel's own files.
    """
    return open(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """Opens a file as `open_input` does, and returns its descriptor, which the caller closes.

    Raises:
        OSError: as `open_input`.
    """
    _require_regular(path, os.stat(path))  # opening a device can already have effects
    # Without waiting for a writer, if the file was replaced by a pipe meanwhile.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def require_regular(path: Path) -> None:
    """Refuses what `open_input` refuses, for a library that opens the file itself.

    Raises:
        OSError: there is no such file, or it is no regular file.
    """
    _require_regular(path, os.stat(path))


def read_input(path: Path, limit: int) -> bytes:
    """Returns the content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: the file cannot be read, is no regular file, or is larger.
    """
    with open_input(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            reason = f"it has {size} bytes, and at most {limit} are read of such a file"
            raise TooLargeError(errno.EINVAL, reason, str(path))
        return stream.read(size)  # a reader makes room for as much as it is asked for


def is_inside(name: str) -> bool:
    """Whether a name, relative to a folder, stays in that folder on every system.

    >>> is_inside("weights/weight.bin"), is_inside("../weight.bin"), is_inside("/etc/passwd")
    (True, False, False)
    """
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not set(name) & set("\\:\0") and parts[0] != "/"


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), None)
    if kind is None and found.st_dev in _kernel_devices():
        kind = "a file of the kernel"
    if kind is not None or not stat.S_ISREG(found.st_mode):
        reason = f"it is {kind or 'no file'}, and EdgeForge reads regular files only"
        raise NotRegularError(errno.EINVAL, reason, str(path))


@cache
def _kernel_devices() -> frozenset[int]:
    root = os.stat("/").st_dev if os.path.exists("/") else -1
    found = {os.stat(place).st_dev for place in _KERNELS if os.path.isdir(place)}
    return frozenset(found - {root})
