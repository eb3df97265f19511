"""Computes SHA-256 of a checkpoint's files, and caches it until a file changes on disk."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgeforge.cache import cache_dir, read_record, writable_cache, write_record
from edgeforge.checkpoint.json_text import reason
from edgeforge.errors import CheckpointError
from quant.input_files import open_input
from quant.processors import default_threads

BLOCK_BYTES = 4 << 20
_SCHEMA = 2
_SHA256 = re.compile("[0-9a-f]{64}")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from one thread at a time."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of a checkpoint.

    Attributes:
        name: Path relative to the checkpoint's folder.
        size: Bytes.
        sha256: Lower-case hexadecimal, as ``sha256sum`` prints it.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointDigest:
    """SHA-256 of a checkpoint's weight files and config.

    Attributes:
        sha256: SHA-256 of the lines ``<sha256>  <name>`` sorted by name: what
            ``sha256sum NAMES... | sha256sum`` prints.
        files: The digests of the files, sorted by name.
    """

    sha256: str
    files: tuple[FileDigest, ...]


def digest_files(
    files: Sequence[tuple[str, Path]], progress: Progress | None = None
) -> CheckpointDigest:
    """Hash named files; take the digest of a file that has not changed from the cache.

    A cached digest is used only if the resolved path, the size, the modification and change times
    in nanoseconds, and the inode are the same. A cache that cannot be written is not an error.

    Args:
        files: Pairs of the name to record and the path to read.
        progress: Called with (bytes done, bytes in all), from one thread at a time.

    Raises:
        CheckpointError: A file cannot be read, changed while it was read, or is not what the hub
            named it after.
    """
    counter = _Counter(sum(_stat(path).st_size for _, path in files), progress)
    with ThreadPoolExecutor(max(1, min(default_threads(), len(files)))) as pool:
        jobs = [(name, pool.submit(_digest_file, path, counter)) for name, path in files]
        try:
            found = [FileDigest(name, *job.result()) for name, job in jobs]
            for (_, path), file in zip(files, found, strict=True):
                _require_named(path, file.sha256)
        except BaseException:
            counter.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    found.sort(key=lambda file: file.name)
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in found)
    return CheckpointDigest(hashlib.sha256(lines.encode()).hexdigest(), tuple(found))


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stopped = False
        self._total = total
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def _identity(path: Path, status: os.stat_result) -> dict[str, object]:
    return {
        "schema": _SCHEMA,
        "path": os.fspath(path.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _digest_file(path: Path, counter: _Counter) -> tuple[int, str]:
    before = _stat(path)
    identity = _identity(path, before)
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    record = writable_cache() / "digests" / f"{key}.json"
    known = _recall(record, identity)
    if known is None and record.parent.parent != cache_dir():
        known = _recall(cache_dir() / "digests" / record.name, identity)
    if known is not None:
        counter.add(before.st_size)
        return before.st_size, known
    found = hash_file(path, before.st_size, counter)
    if _identity(path, _stat(path)) != identity:
        raise CheckpointError(
            f"{path} changed while it was read: wait until the program that writes it is done"
        )
    _remember(record, {**identity, "sha256_of_file": found})
    return before.st_size, found


def hash_file(path: Path, size: int, counter: _Counter) -> str:
    """SHA-256 of the first ``size`` bytes, so that a file that grows meanwhile still has an end.

    Raises:
        CheckpointError: The file cannot be read, or another thread failed meanwhile.
    """
    state = hashlib.sha256()
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        with open_input(path) as file:
            while size and not counter.stopped:
                count = file.readinto(block[:size])
                if not count:
                    break
                state.update(block[:count])
                counter.add(count)
                size -= count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if counter.stopped:
        raise CheckpointError(f"hashing {path} was stopped")
    return state.hexdigest()


def _recall(record: Path, identity: dict[str, object]) -> str | None:
    content = read_record(record) or {}
    sha256 = content.pop("sha256_of_file", None)
    return sha256 if content == identity and isinstance(sha256, str) else None


def _remember(record: Path, content: dict[str, object]) -> None:
    with suppress(OSError):
        write_record(record, content)


def _require_named(path: Path, sha256: str) -> None:
    """Refuses a file of a hub's cache whose content is not what it is named after.

    The hub names large files after their SHA-256.

    Raises:
        CheckpointError: The file was damaged since, or while, it was downloaded.
    """
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and blob.name != sha256:
        raise CheckpointError(
            f"{path} is damaged: the hub names it {blob.name[:12]}... after its SHA-256, which is "
            f"{sha256[:12]}...: remove {blob} and download the model again"
        )
