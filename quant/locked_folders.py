"""Folders that are locked while their process writes them, so that those of killed ones are known.

The lock lies on the folder itself (``flock`` of its descriptor), so it leaves no file behind, moves
with the folder when that is renamed, and ends with the process however that ends. A process's
number alone would say nothing: another process may have it by now.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Some network file systems lock no folder, and Windows has no `flock`.
_CANNOT_LOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL})


@dataclass
class LockedFolder:
    """A folder that this process holds.

    Attributes:
        path: where it was when it was locked.
        descriptor: of the folder, whose lock ends when it is closed; None where the file system
            has no locks.
    """

    path: Path
    descriptor: int | None

    def release(self) -> None:
        """Ends the lock."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def make_locked(parent: Path, stem: str) -> LockedFolder:
    """Makes and locks a new folder ``stem``, or ``stem-1``, ``stem-2``, ... if that exists.

    Raises:
        OSError: the folder cannot be made.
    """
    for number in itertools.count():
        path = parent / (f"{stem}-{number}" if number else stem)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        with suppress(BlockingIOError, FileNotFoundError):
            # Another process may take a folder for a left-over between the two calls.
            return LockedFolder(path, _lock(path))
    raise AssertionError("counting ended")


def lock(folder: Path) -> LockedFolder | None:
    """Locks an existing folder; None where another process holds it or the system has no locks."""
    try:
        descriptor = _lock(folder)
    except OSError:
        return None
    return None if descriptor is None else LockedFolder(folder, descriptor)


@contextmanager
def left_over(folder: Path) -> Iterator[bool]:
    """Yields whether no live process holds a folder; this process holds it until the block ends.

    Where that cannot be told, because the file system has no locks, it yields False.
    """
    held = None if folder.is_symlink() else lock(folder)
    try:
        yield held is not None
    finally:
        if held is not None:
            held.release()


@contextmanager
def unfinished(parent: Path, name: str) -> Iterator[Path]:
    """Makes a locked folder ``.NAME.partial-...`` that is removed when the block ends.

    Those that killed processes left in the same parent are removed first. The block may rename the
    folder, which then stays.

    Args:
        parent: a folder of EdgeForge's own, such as one of the cache; it is made if need be.
        name: what is going to be made.

    Raises:
        OSError: the folder cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(".*.partial-*"):
        with left_over(other) as free:
            if free:
                shutil.rmtree(other, ignore_errors=True)
    held = make_locked(parent, f".{name}.partial-{os.getpid()}-{threading.get_ident()}")
    try:
        yield held.path
    finally:
        shutil.rmtree(held.path, ignore_errors=True)
        held.release()


def _lock(folder: Path) -> int | None:
    """Returns a descriptor with the lock, or None where there are no locks.

    Raises:
        BlockingIOError: another process holds the lock.
        FileNotFoundError: the folder was removed or renamed meanwhile.
        OSError: it cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except OSError as error:
        os.close(descriptor)
        if error.errno in _CANNOT_LOCK:
            return None
        raise
    return descriptor
