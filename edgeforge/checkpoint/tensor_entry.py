"""`TensorEntry`: the dtype, shape and place of one tensor in a weight file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_DIMENSIONS = 64
MAX_TENSORS_PER_FILE = 100_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: row-major, little-endian, uncompressed bytes in a file.

    Attributes:
        name: The tensor's name in the checkpoint.
        dtype: ``float32``, ``float16`` or ``bfloat16`` for a tensor that can be read as a weight,
            ``int32`` or ``int64`` for one that can be read as integers; tensors of other dtypes
            (``float8_e4m3fn``, ...) are listed and refused when they are read.
        shape: Dimensions, outermost first; ``()`` for a scalar.
        file: The weight file.
        offset: Bytes from the file's start to the first element.
        nbytes: Number of bytes of all elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def count_elements(shape: Sequence[int]) -> int | None:
    """Return the number of elements of ``shape``, or None when an index would not fit 63 bits.

    A dimension of zero does not hide an overflow of the others, since no array library accepts such
    a shape.

    >>> count_elements((3, 4)), count_elements(()), count_elements((0, 5))
    (12, 1, 0)
    >>> count_elements((0, 2**62, 2**62)) is None
    True
    """
    elements = 1
    for size in shape:
        elements *= max(size, 1)
        if elements >= 2**63:
            return None
    return 0 if 0 in shape else elements
