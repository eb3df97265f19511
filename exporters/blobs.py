"""Bytes of an artifact's weight file: where the store holds them, and how they are converted.

A conversion works on one chunk at a time, so that memory use does not grow with the weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from exporters.copying import copy_range
from quant.store.store import Extent

_CHUNK = 1 << 20


def flip_sign(data: bytes) -> bytes:
    """Turns codes 0 to 255 into signed bytes (the code minus 128), or back.

    >>> list(flip_sign(bytes([0, 128, 255])))
    [128, 0, 127]
    """
    return (np.frombuffer(data, np.uint8) ^ np.uint8(128)).tobytes()


def flip_nibble_signs(data: bytes) -> bytes:
    """Turns codes 0 to 15, two in a byte, into signed nibbles (the code minus 8), or back.

    >>> flip_nibble_signs(bytes([0x08, 0xF7])).hex()
    '807f'
    """
    return (np.frombuffer(data, np.uint8) ^ np.uint8(0x88)).tobytes()


def widen_bfloat16(data: bytes) -> bytes:
    """Converts bfloat16 to float32, exactly.

    >>> np.frombuffer(widen_bfloat16(bytes([0x80, 0x3F])), np.float32).tolist()
    [1.0]
    """
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)).tobytes()


def narrow_to_bfloat16(data: bytes) -> bytes:
    """Undoes `widen_bfloat16`.

    A chunk with a float32 value that bfloat16 cannot hold is returned as it is, so that its digest
    differs from the store's and the damage is found.

    >>> narrow_to_bfloat16(widen_bfloat16(b"abcd"))
    b'abcd'
    """
    wide = np.frombuffer(data, np.uint32)
    return data if (wide & 0xFFFF).any() else (wide >> np.uint32(16)).astype(np.uint16).tobytes()


@dataclass(frozen=True)
class Conversion:
    """A conversion of bytes and its inverse; each takes one chunk at a time.

    Attributes:
        apply: converts the store's bytes to the file's.
        undo: converts the file's bytes back to the store's.
        growth: how many bytes of the file stand for one byte of the store.
    """

    apply: Callable[[bytes], bytes]
    undo: Callable[[bytes], bytes]
    growth: int = 1


SIGNED: Final = Conversion(flip_sign, flip_sign)
SIGNED_NIBBLES: Final = Conversion(flip_nibble_signs, flip_nibble_signs)
WIDENED: Final = Conversion(widen_bfloat16, narrow_to_bfloat16, 2)


@dataclass(frozen=True)
class Made:
    """Bytes that are made of the store's when they are written, so that none are held before.

    Attributes:
        of: the place in the store that they are made of.
        columns: which of its columns they are made of; equal ones of a place are equal bytes.
        nbytes: how many there are.
        make: makes them.
    """

    of: Extent
    columns: tuple[int, int]
    nbytes: int
    make: Callable[[], bytes] = field(compare=False)


@dataclass(frozen=True)
class Blob:
    """The content of one segment or constant of a weight file.

    Attributes:
        source: the bytes themselves, what makes them, or the place in the store where they are.
        conversion: how the store's bytes are converted; None when they are copied as they are.
    """

    source: bytes | Made | Extent
    conversion: Conversion | None = None

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        if isinstance(self.source, bytes):
            return len(self.source)
        if isinstance(self.source, Made):
            return self.source.nbytes
        return self.source.nbytes * (self.conversion.growth if self.conversion else 1)

    def write(self, target: int, offset: int, sources: Callable[[Extent], int]) -> None:
        """Writes the bytes at an offset of a file.

        Where there is no conversion, the operating system copies them and they do not pass through
        this process's memory.

        Args:
            target: the descriptor of the file.
            offset: the position to write at, in bytes.
            sources: returns an open descriptor of an extent's file.
        """
        if isinstance(self.source, bytes):
            _write(target, self.source, offset)
        elif isinstance(self.source, Made):
            _write(target, self.source.make(), offset)
        elif self.conversion is None:
            copy_range(sources(self.source), self.source, target, offset)
        else:
            for chunk in _chunks(sources(self.source), self.source):
                changed = self.conversion.apply(chunk)
                _write(target, changed, offset)
                offset += len(changed)


def _chunks(source: int, extent: Extent) -> Iterator[bytes]:
    done = 0
    while done < extent.nbytes:
        chunk = os.pread(source, min(_CHUNK, extent.nbytes - done), extent.offset + done)
        if not chunk:
            raise OSError(f"{extent.file} ended {extent.nbytes - done} bytes early")
        yield chunk
        done += len(chunk)


def _write(target: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written
