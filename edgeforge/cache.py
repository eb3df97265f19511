"""The folder where EdgeForge keeps what it can compute again, such as digests and weight stores."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from quant.input_files import read_input
from quant.sealed_json import seal, unseal

_LARGEST_RECORD = 1 << 28

FOLDERS = ("stores", "digests", "sensitivities", "cache-ranges", "float-columns", "tokenizers")


def cache_dir() -> Path:
    """Return the cache folder, which may not exist yet, or may be one that can only be read.

    ``$EDGEFORGE_CACHE`` if set, else ``$XDG_CACHE_HOME/edgeforge``, else ``~/.cache/edgeforge``.
    """
    if chosen := os.environ.get("EDGEFORGE_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG base directory specification tells programs to ignore a relative path here.
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "edgeforge"


def read_record(file: Path) -> dict[str, Any] | None:
    """Returns what `write_record` wrote, None where the file is missing, damaged or unreadable.

    What is None is computed again, and nothing is removed.
    """
    try:
        return unseal(read_input(file, _LARGEST_RECORD))
    except (OSError, ValueError):
        return None


def write_record(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON values, whole or not at all, with a digest by which damage is known.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}-{threading.get_ident()}")
    try:
        partial.write_text(seal(content), encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def writable_cache() -> Path:
    """Return the folder to write to: the cache, or a private one where the cache is read-only.

    The private one is a folder of the user's own among the system's temporary files.
    """
    cache = cache_dir()
    if not _is_read_only(cache):
        return cache
    try:
        return _private_folder()
    except OSError:  # no temporary files either: what is written to the cache says why it fails
        return cache


def cache_note() -> str | None:
    """Return one sentence where the cache can only be read, else None."""
    chosen, used = cache_dir(), writable_cache()
    if used == chosen:
        return None
    return (
        f"the cache {chosen} can only be read, so {used} is used: set EDGEFORGE_CACHE to a folder "
        f"that can be written to keep what is computed"
    )


def _is_read_only(cache: Path) -> bool:
    """Tell whether a file system or permissions forbid to write; what is no folder is not told."""
    for folder in (cache, *(cache / name for name in FOLDERS)):
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
            return True
    return False


def _private_folder() -> Path:
    """Return a folder that nobody else can write; others may have made one of the usual name."""
    folder = Path(tempfile.gettempdir()) / f"edgeforge-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.lstat()
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if not is_ours or status.st_mode & 0o022:
            return _new_folder(tempfile.gettempdir())
    return folder


@lru_cache
def _new_folder(temporary: str) -> Path:
    """Return a folder of a new name, the same one until this process ends."""
    return Path(tempfile.mkdtemp(prefix="edgeforge-", dir=temporary))
