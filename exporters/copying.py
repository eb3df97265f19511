"""Copies bytes between files without taking them through this process, where the system can."""

from __future__ import annotations

import errno
import os

from quant.store.store import Extent

_NO_KERNEL_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
)


def copy_range(source: int, extent: Extent, target: int, offset: int) -> None:
    """Copies an extent between files, within the kernel where the system can.

    Raises:
        OSError: the source ended early or the disk is full.
    """
    done = 0
    while done < extent.nbytes:
        left = extent.nbytes - done
        copied = _copy_some(source, extent.offset + done, target, offset + done, left)
        if not copied:
            raise OSError(f"{extent.file} ended {left} bytes early")
        done += copied


def _copy_some(source: int, at: int, target: int, offset: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, at, offset)
        except OSError as error:
            # Some file systems, and pairs of them, have no copy within the kernel.
            if error.errno not in _NO_KERNEL_COPY:
                raise
    return os.pwrite(target, os.pread(source, min(count, 1 << 22), at), offset)
