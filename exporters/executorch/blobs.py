"""Conversions of the store's bytes for a .pte, besides those that all targets share."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporters.blobs import (
    SIGNED,
    WIDENED,
    Blob,
    Conversion,
    Made,
    flip_sign,
    narrow_to_bfloat16,
    widen_bfloat16,
)

__all__ = [
    "NIBBLES_SWAPPED",
    "SIGNED",
    "TAPS",
    "WIDE",
    "WIDENED",
    "Blob",
    "Conversion",
    "Made",
    "flip_sign",
    "narrow_to_bfloat16",
    "swap_nibbles",
    "widen_bfloat16",
]

# The end of the key of a weight that is bfloat16 in the store and float32 in the file.
WIDE: Final = "widened"
# The end of the key of a convolution's weight, whose rows and columns the file exchanges.
TAPS: Final = "taps"


def swap_nibbles(data: bytes) -> bytes:
    """Exchanges the two codes of each byte.

    ExecuTorch's embedding kernels read the even column from the high nibble.

    >>> swap_nibbles(bytes([0x2A])).hex()
    'a2'
    """
    codes = np.frombuffer(data, np.uint8)
    return (codes << 4 | codes >> 4).tobytes()


NIBBLES_SWAPPED: Final = Conversion(swap_nibbles, swap_nibbles)
