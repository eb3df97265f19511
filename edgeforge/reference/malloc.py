"""How the C library keeps memory that has been freed."""

from __future__ import annotations

import ctypes
from typing import Final

# The parameter's number in glibc's malloc.h.
_M_MMAP_THRESHOLD: Final = -3
_LARGE: Final = 1 << 20


def return_large_blocks() -> bool:
    """Makes blocks of 1 MB and more go back to the system as soon as they are freed.

    glibc takes large blocks from the system one by one, and gives them back, only until one is
    freed: from then on it keeps blocks of up to that size, 32 MB at most, in a heap for each
    thread. Tensors of activations are of such sizes, and whatever small is allocated between them
    pins the space that they leave: calibration at a width of 8192 held 1 GB more than its tensors.

    Returns:
        Whether this C library could be told so.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS and Windows keep none
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, _LARGE))
