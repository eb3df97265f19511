"""Controls how much freed memory the C library keeps."""

from __future__ import annotations

import ctypes
from typing import Final

# The value of M_MMAP_THRESHOLD in glibc's malloc.h.
_M_MMAP_THRESHOLD: Final = -3
_LARGE: Final = 1 << 20


def return_large_blocks() -> bool:
    """Makes the C library return blocks of 1 MB and more to the system as soon as they are freed.

    At first glibc maps each large block on its own and returns it when it is freed. As soon as one
    is freed, glibc raises the threshold to that block's size (32 MB at most) and keeps blocks up to
    the threshold in a heap of each thread. Tensors of activations have such sizes, and small
    blocks between them keep their space from being returned: calibration at a width of 8192 held
    1 GB more than its tensors.

    Returns:
        Whether this C library has the setting and accepted it.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS and Windows have no mallopt
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, _LARGE))
