"""Writes a file beside its final path and renames it, so that it is whole or as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(final: Path) -> Iterator[BinaryIO]:
    """Opens a new file that takes its final name when the block ends without an error.

    The file beside it is always a new one: a link that lies there is replaced and never followed.

    Args:
        final: the file's path; a link there is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    partial = final.with_name(f".{final.name}.partial")
    with suppress(FileNotFoundError):
        partial.unlink()
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        partial.replace(final)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
