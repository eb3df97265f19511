"""Output folders that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from edgeforge.errors import DiskFullError, EdgeForgeError, UsageError
from edgeforge.output_folder.contents import strange_file
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.output_folder.left_overs import repair_and_sweep
from edgeforge.output_folder.swap import put_in_place
from quant.locked_folders import LockedFolder, make_locked

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_folder(
    final: Path,
    force: bool,
    *,
    needed_bytes: int | None = None,
    inputs: Sequence[Input] = (),
) -> Iterator[Path]:
    """Yield a temporary folder beside ``final``, and rename it to ``final`` when it is complete.

    When the block ends, every file is flushed to the disk and the folder is renamed. When the block
    raises, also by an interrupt, the temporary folder is removed and ``final`` is as it was before.
    What killed processes left beside ``final`` is put back or swept first.

    Args:
        final: The folder's final path; missing parents are made. A symbolic link is followed.
        force: Whether to replace an existing folder, once the new one is complete. A folder with a
            file that EdgeForge did not write is never replaced.
        needed_bytes: Number of bytes that will be written, if known; the free space is checked
            before any work starts.
        inputs: What ``final`` may neither be nor hold nor lie in.

    Yields:
        The empty temporary folder, on the same file system as ``final``.

    Raises:
        UsageError: ``final`` cannot be used, or is not empty and ``force`` is off.
        DiskFullError: The disk is full, or a quota or a file size limit is reached.
    """
    check_output(final, force, inputs)
    final = Path(os.path.realpath(final.expanduser()))
    partial: LockedFolder | None = None
    made: list[Path] = []
    try:
        try:
            _make_parents(final.parent, made)
            _check_space(final, needed_bytes)
            partial = make_locked(final.parent, f".{final.name}.partial-{os.getpid()}")
        except OSError as error:
            raise _explain(error, final, needed_bytes) or UsageError(
                f"{final} cannot be made ({error.strerror}): choose another folder"
            ) from error
        ours = partial.path.stat()
        yield partial.path
        _flush(partial.path)
        _check_final(final, force)
        with _deferred_interrupt():
            put_in_place(partial.path, final)
    except BaseException as error:
        with _deferred_interrupt():
            if partial is not None:
                _remove(partial.path, ours)
            for parent in reversed(made):
                with suppress(OSError):
                    parent.rmdir()
        explained = _explain(error, final, needed_bytes)
        if explained is not None:
            raise explained from error
        raise
    finally:
        if partial is not None:
            partial.release()


def check_output(final: Path, force: bool, inputs: Sequence[Input] = ()) -> None:
    """Refuses, before any work, an output folder that `atomic_folder` would refuse.

    Raises:
        UsageError: as `atomic_folder`.
    """
    refuse_inputs(final, inputs)
    final = Path(os.path.realpath(final.expanduser()))
    if final.name:
        repair_and_sweep(final)
    _check_final(final, force)


def _check_final(final: Path, force: bool) -> None:
    try:
        if not final.name:
            raise UsageError(f"{final} cannot be an output folder: name a new one")
        if not final.exists():
            return
        if not final.is_dir():
            raise UsageError(f"{final} is a file: name a folder to write to")
        if not any(final.iterdir()):
            return
        if not force:
            raise UsageError(
                f"{final} exists and is not empty: choose another folder, or pass --force to "
                "replace it"
            )
        strange = strange_file(final)
        if strange is not None:
            raise UsageError(
                f"{final} holds {strange}, which EdgeForge did not write there, so --force does "
                f"not replace it: choose another folder, or move what is yours away"
            )
    except OSError as error:
        raise UsageError(f"{final} cannot be used for output: {error.strerror}") from error


def _remove(partial: Path, ours: os.stat_result) -> None:
    """Removes the temporary folder, unless another one bears its name after an exchange."""
    with suppress(OSError):
        if os.path.samestat(partial.lstat(), ours):
            shutil.rmtree(partial, ignore_errors=True)


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make missing folders, appending each to ``made``, outermost first."""
    for path in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
        path.mkdir(exist_ok=True)
        made.append(path)


def _check_space(final: Path, needed_bytes: int | None) -> None:
    if needed_bytes is None:
        return
    free = shutil.disk_usage(final.parent).free
    if free < needed_bytes:
        raise DiskFullError(
            f"{final} needs {needed_bytes} bytes and its disk has {free} free: free "
            f"{needed_bytes - free} bytes or choose a folder on another disk"
        )


def _explain(error: BaseException, final: Path, needed_bytes: int | None) -> EdgeForgeError | None:
    """Return a DiskFullError if a lack of space is anywhere in an error's chain of causes."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, DiskFullError):
            return cause if cause is not error else None
        if isinstance(cause, OSError) and cause.errno in _OUT_OF_SPACE:
            break
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError):
        return None
    need = f" (it needs {needed_bytes} bytes)" if needed_bytes is not None else ""
    return DiskFullError(
        f"{final} could not be written{need}: {cause.strerror}; nothing was left there: free some "
        "space or choose a folder on another disk"
    )


def _flush(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _fsync(os.path.join(root, name))
        _fsync(root)


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Hold back Ctrl-C until the block ends, so that no swap or clean-up stays half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        if handler is not None:  # None means that C code set it; Python cannot set it again.
            signal.signal(signal.SIGINT, handler)
    if received and callable(handler):
        handler(*received[0])
