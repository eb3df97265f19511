"""Frames: what a worker and whoever drives it send each other over a pair of byte streams.

A frame is a line of JSON, whose ``arrays`` lists dtype and shape of the arrays that follow it, raw
and little-endian. The other side may be a device that lies, so nothing that it states is believed
beyond the sizes that the reader allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES: Final = {"int64": "<i8", "float32": "<f4", "int32": "<i4", "bool": "|b1"}
LONGEST_LINE: Final = 1 << 20
"""Bytes of a frame's line, at most."""


class FrameError(ValueError):
    """What came is no frame."""


class FrameCutError(FrameError):
    """The stream ended within a frame, as it does when who writes it is killed."""


def write_frame(
    stream: BinaryIO, words: Mapping[str, object], arrays: Sequence[Array] = ()
) -> None:
    """Writes a frame and flushes the stream.

    Args:
        stream: takes the bytes.
        words: JSON values; ``arrays`` is a name of the frame's own.
        arrays: of the dtypes of `DTYPES` each, of any shape.

    Raises:
        OSError: the stream is closed.
    """
    stated = [{"dtype": each.dtype.name, "shape": list(each.shape)} for each in arrays]
    stream.write(json.dumps({**words, "arrays": stated}).encode() + b"\n")
    for each in arrays:
        stream.write(np.ascontiguousarray(each, DTYPES[each.dtype.name]).data)
    stream.flush()


def read_frame(stream: BinaryIO, most_bytes: int) -> tuple[dict[str, Any], list[Array]] | None:
    """Reads a frame.

    Args:
        stream: gives the bytes.
        most_bytes: how many bytes its arrays have together, at most.

    Returns:
        The words and the arrays; None where the stream ends before a frame.

    Raises:
        FrameError: it is no frame, the stream ends within one, or it is larger than is allowed.
        OSError: the stream fails.
    """
    line = stream.readline(LONGEST_LINE)
    if not line:
        return None
    try:
        words = json.loads(line)
        stated = [(DTYPES[each["dtype"]], tuple(each["shape"])) for each in words.pop("arrays")]
        sizes = [_size(dtype, shape) for dtype, shape in stated]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FrameError(f"{_shown(line)} is no frame") from error
    if sum(sizes) > most_bytes:
        raise FrameError(f"a frame states {sum(sizes)} bytes, where at most {most_bytes} can come")
    arrays = [np.empty(shape, dtype) for dtype, shape in stated]
    for each in arrays:
        _fill(stream, each)
    return words, arrays


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array.

    Raises:
        ValueError: the shape is none.
    """
    if not all(type(each) is int and each >= 0 for each in shape) or len(shape) > 8:
        raise ValueError("no shape")
    return math.prod(shape) * np.dtype(dtype).itemsize


def _fill(stream: BinaryIO, array: Array) -> None:
    """Reads an array where it stays, because logits may be a large part of the memory."""
    room = array.reshape(-1).view(np.uint8).data
    while len(room):
        count = stream.readinto(room)  # type: ignore[attr-defined]
        if not count:
            raise FrameCutError("the stream ends within a frame")
        room = room[count:]


def _shown(line: bytes) -> str:
    """The beginning of a line, for a message on a terminal."""
    return repr(line[:60])
