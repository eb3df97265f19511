"""Copies bytes between files inside the operating system's kernel, where the system can.

Weights of many gigabytes then never pass through this process's memory.
"""

from __future__ import annotations

import errno
import os

from quant.store.store import Extent

_NO_KERNEL_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
)


def copy_range(source: int, extent: Extent, target: int, offset: int) -> None:
    """Copies an extent of one file to an offset of another.

    Args:
        source: the descriptor of the extent's file.
        extent: the bytes to copy.
        target: the descriptor of the file to write.
        offset: the position to write at, in bytes.

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
            # Some file systems, and some pairs of them, cannot copy within the kernel.
            if error.errno not in _NO_KERNEL_COPY:
                raise
    return os.pwrite(target, os.pread(source, min(count, 1 << 22), at), offset)
