"""Puts a finished folder in the place of another one, in one step where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from edgeforge.errors import UsageError
from edgeforge.output_folder.contents import remove_known, strange_file
from quant.locked_folders import lock, make_locked

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2  # Linux's flag, and macOS's RENAME_SWAP
_CANNOT_EXCHANGE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def put_in_place(partial: Path, final: Path) -> None:
    """Renames a finished folder to its final path; removes what EdgeForge wrote there before.

    Where the system can exchange two folders, the final path is at no moment without a whole
    folder. Else two renames follow each other, and `repair_and_sweep` in `left_overs.py`
    undoes the first one after a kill between them.

    Raises:
        UsageError: it cannot be renamed, or there is a file in the old folder that EdgeForge did
            not write; the old folder is in its place then.
    """
    replaced = final.is_dir() and any(final.iterdir())
    held = lock(final) if replaced else None
    try:
        old = _replace(partial, final) if replaced else None
        if not replaced:  # the path is free, or that of an empty folder
            os.rename(partial, final)
        with suppress(OSError):  # not every file system flushes folders
            _flush(final.parent)
        if old is not None:
            strange = _strange_or_none(old)
            if strange is not None:
                _put_back(old, final, partial)
                raise UsageError(
                    f"{final} got the file {strange} meanwhile, which EdgeForge did not write, so "
                    f"it was not replaced: choose another folder"
                )
            remove_known(old, strange_file)
    except OSError as error:
        raise UsageError(
            f"{final} cannot be put in place ({error.strerror}): name a folder inside it instead"
        ) from error
    finally:
        if held is not None:
            held.release()


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; returns False where the system or its disk cannot.

    Raises:
        OSError: they cannot be renamed.
    """
    rename = _exchanger()
    if rename is None:
        return False
    if rename(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _exchanger() -> Any:
    """Returns the system's function that exchanges two paths, or None."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        flag = ctypes.c_uint(_RENAME_EXCHANGE)
        return lambda one, other: library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, flag)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        flag = ctypes.c_uint(_RENAME_EXCHANGE)
        return lambda one, other: library.renamex_np(one, other, flag)
    return None


def _strange_or_none(folder: Path) -> str | None:
    """Returns None as well where a folder cannot be read: `remove_known` leaves it alone then."""
    try:
        return strange_file(folder)
    except OSError:
        return None


def _replace(partial: Path, final: Path) -> Path:
    """Returns where the old folder is afterwards."""
    if exchange(partial, final):
        return partial
    # A rename replaces an empty folder, so this empty sibling reserves the name.
    reserved = make_locked(final.parent, f".{final.name}.old-{os.getpid()}")
    old = reserved.path
    reserved.release()
    try:
        os.rename(final, old)
    except OSError:
        with suppress(OSError):
            old.rmdir()
        raise
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    return old


def _put_back(old: Path, final: Path, partial: Path) -> None:
    if old == partial and exchange(old, final):
        return
    os.rename(final, partial)
    os.rename(old, final)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
