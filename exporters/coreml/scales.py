"""Converts the store's scales to Core ML's float16 without loss.

float16 holds a bfloat16 number exactly where it is a normal float16 number, from 2^-14 on. Where a
row of a matrix has smaller scales, they are stored multiplied by a power of two, and the row's
result is multiplied by the inverse. Scales that are float16 in the store, which a checkpoint
quantized elsewhere may have, are stored as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from exporters.errors import ExportError
from quant.store.store import Extent

_BIAS: Final = 127 - 15  # between the exponents of bfloat16 and float16
_SMALLEST, _LARGEST = -14, 15  # exponents of float16's normal numbers
# The largest exponent of a multiplied row's scales. The row's sums of products are float16 too, and
# larger scales could make them overflow.
_LARGEST_MOVED: Final = -3
_NONE: Final = 0x7F80  # the bits of bfloat16's infinity, which is larger than any scale
_BLOCK: Final = 1 << 20

Exponents = npt.NDArray[np.int32]
"""``int32[rows, 1]``: the exponent of the power of two that multiplies each row of scales."""


def to_half(scales: npt.NDArray[np.uint16], exponents: Exponents) -> npt.NDArray[np.uint16]:
    """Converts bits of bfloat16 ``[rows, groups]`` to float16, multiplied by ``2 ** exponents``.

    >>> to_half(np.array([[0x3F80, 0]], np.uint16), np.array([[3]], np.int32)).view(np.float16)
    array([[8., 0.]], dtype=float16)
    """
    sizes = (scales & 0x7FFF).astype(np.int32)
    moved = np.where(sizes, (sizes << 3) - (_BIAS - exponents << 10), 0)
    half: npt.NDArray[np.int32] = moved | (scales & 0x8000)
    return half.astype(np.uint16)


def from_half(scales: npt.NDArray[np.uint16], exponents: Exponents) -> npt.NDArray[np.uint16]:
    """Undoes `to_half`.

    A float16 number that comes from no bfloat16 keeps its bits, so that the weight's digest
    differs from the store's.
    """
    sizes = (scales & 0x7FFF).astype(np.int32)
    moved = np.where(sizes, sizes + (_BIAS - exponents << 10) >> 3, 0)
    whole = (sizes & 7 == 0) & (moved < _NONE)
    wide: npt.NDArray[np.int32] = np.where(whole, moved | (scales & 0x8000), scales)
    return wide.astype(np.uint16)


def row_exponents(weight: str, extent: Extent) -> Exponents:
    """The smallest exponents, from 0 on, that make every scale of a row a normal float16 number.

    Args:
        weight: the weight's name, for the error.
        extent: the place of the scales, ``bfloat16[rows, groups]``.

    Raises:
        ExportError: a row's scales are too far apart, or too large.
    """
    found = []
    for start, scales in row_blocks(extent):
        sizes = scales & np.uint16(0x7FFF)
        most = sizes.max(axis=1)
        least = np.where(sizes, sizes, np.uint16(_NONE)).min(axis=1)
        low = np.where(most, (least >> 7).astype(np.int32) - 127, 0)
        high = np.where(most, (most >> 7).astype(np.int32) - 127, 0)
        needed = np.maximum(_SMALLEST - low, 0)
        bad = (high + needed > np.where(needed, _LARGEST_MOVED, _LARGEST)) | (low < -126)
        if bad.any():
            row = int(bad.argmax())
            # Products of larger scales with 8-bit steps are beyond float16's range.
            use = "fp32" if high[row] >= _LARGEST - 7 else "fp16"
            raise ExportError(
                f"row {start + row} of {weight} has scales from 2^{low[row]} to 2^{high[row]}; "
                f"Core ML's scales are float16, which holds 2^-14 to 2^15, and smaller ones only "
                f"in rows where all scales are small: keep it {use}"
            )
        found.append(needed)
    return np.concatenate(found)[:, None].astype(np.int32)


def are_half(scales: npt.NDArray[np.uint16]) -> bool:
    """Whether the scales of a file are float16 in the store too, where no row was multiplied.

    A store has float16 scales only where bfloat16 cannot hold all of them. So at least one scale
    uses the three lowest bits, which a scale that comes from bfloat16 never does.

    >>> are_half(np.array([1.5, 0.1], np.float16).view(np.uint16))
    True
    >>> are_half(np.array([1.5, 2.0**-20], np.float16).view(np.uint16))
    False
    """
    return bool((scales & 7).any())


def row_blocks(extent: Extent) -> Iterator[tuple[int, npt.NDArray[np.uint16]]]:
    """Yields some whole rows of the scales at a time, with the number of the first row."""
    rows, groups = extent.shape
    step = max(1, _BLOCK // (2 * groups))
    with extent.file.open("rb") as stream:
        stream.seek(extent.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = stream.read(2 * groups * count)
            if len(data) < 2 * groups * count:
                raise OSError(f"{extent.file} ended early")
            yield start, np.frombuffer(data, np.uint16).reshape(count, groups)


@dataclass(frozen=True)
class ScaleBlob:
    """Scales of the store that are converted when they are written to the weight file.

    Attributes:
        source: the place of the scales in the store, ``bfloat16[rows, groups]``.
        exponents: the exponent of each row.
    """

    source: Extent
    exponents: Exponents

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.source.nbytes

    def write(self, target: int, offset: int, sources: Callable[[Extent], int]) -> None:
        """Writes the scales as float16 at an offset of a file, some rows at a time."""
        for start, scales in row_blocks(self.source):
            data = to_half(scales, self.exponents[start : start + len(scales)]).tobytes()
            view = memoryview(data)
            while view:
                written = os.pwrite(target, view, offset)
                view, offset = view[written:], offset + written
