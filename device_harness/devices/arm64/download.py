"""Downloads of files whose digest is known; one that was cut goes on where it ended."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Final

from device_harness.devices.progress import Progress, no_progress
from device_harness.errors import SetupError

OUT_OF_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that are raised as they are: the disk is full."""
_PIECE: Final = 1 << 18
_TRIES: Final = 4
_TIMEOUT: Final = 60.0  # seconds in which nothing arrives
_LARGEST: Final = 2 << 30  # bytes, of a file whose size is not known


class NotOnMirrorError(SetupError):
    """The address names no file: a mirror keeps only the newest version of a package."""


class NotReachableError(SetupError):
    """The server cannot be reached, refuses, or always ends the connection."""


class _Cut(Exception):
    """The connection ended before the file did; what arrived is kept."""


def fetch(
    address: str,
    target: Path,
    sha256: str,
    size: int | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Brings a file here, whole and of the stated digest, or not at all.

    Args:
        address: ``http:``, ``https:`` or ``file:``.
        target: where it is kept; what is there and has the digest is not brought again.
            ``TARGET.partial`` beside it holds what a cut download brought.
        sha256: of the file.
        size: of the file, in bytes; None where it is not known.
        progress: is told the bytes.

    Raises:
        NotOnMirrorError: the address names no file.
        NotReachableError: it cannot be reached.
        SetupError: it cannot be written, or what arrives is something else.
        OSError: the disk is full.
    """
    name = urllib.parse.unquote(address.rsplit("/", 1)[-1])
    try:
        if is_whole(target, sha256):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        begun_before = partial.exists() and partial.stat().st_size > 0
        _bring(address, name, partial, size, progress)
        found = digest_of(partial)
        if found != sha256 and begun_before:  # the old beginning may be of another file
            partial.unlink()
            _bring(address, name, partial, size, progress)
            found = digest_of(partial)
        if found != sha256:
            partial.unlink()
            raise SetupError(
                f"{name} from {_host(address)} has the digest sha256:{found}, not the pinned "
                f"sha256:{sha256}: nothing of it is used; try another mirror or index"
            )
        partial.replace(target)
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise
        raise SetupError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def is_whole(target: Path, sha256: str) -> bool:
    """Whether a file is there and has a digest."""
    return target.is_file() and digest_of(target) == sha256


def digest_of(file: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _bring(address: str, name: str, partial: Path, size: int | None, progress: Progress) -> None:
    """Brings the rest of a file; a connection that is cut is made again a few times."""
    why = ""
    for turn in range(_TRIES):
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _bring_once(address, name, partial, size, progress)
            return
        except _Cut as cut:
            why = str(cut)
        grown = partial.exists() and partial.stat().st_size > before
        if not grown and turn:
            break
        time.sleep(0.2 * turn)
    there = partial.stat().st_size if partial.exists() else 0
    kept = f"; its first {there} bytes are kept and the next set-up goes on from there" * (
        there > 0
    )
    raise NotReachableError(f"{name} cannot be fetched from {_host(address)}: {why}{kept}")


def _bring_once(
    address: str, name: str, partial: Path, size: int | None, progress: Progress
) -> None:
    there = partial.stat().st_size if partial.exists() else 0
    limit = _LARGEST if size is None else size
    if there > limit:
        partial.unlink()
        there = 0
    if size is not None and there == size:
        return
    headers = {"User-Agent": "edgeforge", "Accept-Encoding": "identity"}
    if there:
        headers["Range"] = f"bytes={there}-"
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(address, headers=headers), timeout=_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise NotOnMirrorError(f"{_host(address)} has no {name}") from None
        if error.code == 416:  # nothing is left to send, or the beginning is of a longer file
            if size is None:
                return
            partial.unlink(missing_ok=True)
        raise _Cut(f"it answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(_words(error)) from None
    with answer:
        if there and getattr(answer, "status", None) != 206:
            there = 0
        _write(answer, name, partial, there, limit, size, progress)


def _write(
    answer: http.client.HTTPResponse,
    name: str,
    partial: Path,
    there: int,
    limit: int,
    size: int | None,
    progress: Progress,
) -> None:
    """Writes what arrives after the first ``there`` bytes."""
    length = answer.headers.get("Content-Length", "")
    total = size or (there + int(length) if length.isdigit() else 0)
    with partial.open("r+b" if there else "wb") as file:
        file.seek(there)
        file.truncate()
        while True:
            try:
                piece = answer.read(_PIECE)
            except http.client.IncompleteRead as error:
                file.write(error.partial[: limit - there])
                raise _Cut("the connection was cut") from None
            except (OSError, http.client.HTTPException) as error:
                raise _Cut(_words(error)) from None
            if not piece:
                break
            there += len(piece)
            if there > limit:
                file.flush()
                os.ftruncate(file.fileno(), 0)
                raise SetupError(
                    f"{name} from {_host(answer.geturl())} is longer than the {limit} bytes that "
                    f"it should have: nothing of it is used"
                )
            file.write(piece)
            progress(name, there, total)
    if total and there < total:
        raise _Cut("the connection was cut")


def _host(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    return f"{parts.scheme}://{parts.hostname or ''}"  # never a password of the address


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason or type(error).__name__)
