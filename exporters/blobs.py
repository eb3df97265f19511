"""Bytes of an artifact's weight file: where they lie in the store, and how they change on the way.

A change works a chunk at a time, so that a weight of any size costs no memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from exporters.copying import copy_range
from quant.store.store import Extent

_CHUNK = 1 << 20


def flip_sign(data: bytes) -> bytes:
    """Codes 0 to 255 as signed bytes, the code less 128, and back.

    >>> list(flip_sign(bytes([0, 128, 255])))
    [128, 0, 127]
    """
    return (np.frombuffer(data, np.uint8) ^ np.uint8(128)).tobytes()


def flip_nibble_signs(data: bytes) -> bytes:
    """Codes 0 to 15, two a byte, as signed nibbles, the code less 8, and back.

    >>> flip_nibble_signs(bytes([0x08, 0xF7])).hex()
    '807f'
    """
    return (np.frombuffer(data, np.uint8) ^ np.uint8(0x88)).tobytes()


def widen_bfloat16(data: bytes) -> bytes:
    """bfloat16 as float32, exactly.

    >>> np.frombuffer(widen_bfloat16(bytes([0x80, 0x3F])), np.float32).tolist()
    [1.0]
    """
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)).tobytes()


def narrow_to_bfloat16(data: bytes) -> bytes:
    """Undoes `widen_bfloat16`; float32 that is no bfloat16 keeps its bits, so that it shows.

    >>> narrow_to_bfloat16(widen_bfloat16(b"abcd"))
    b'abcd'
    """
    wide = np.frombuffer(data, np.uint32)
    return data if (wide & 0xFFFF).any() else (wide >> np.uint32(16)).astype(np.uint16).tobytes()


@dataclass(frozen=True)
class Conversion:
    """A change of bytes and its inverse, a chunk at a time.

    Attributes:
        apply: from the store's bytes to the file's.
        undo: back.
        growth: bytes of the file for one of the store.
    """

    apply: Callable[[bytes], bytes]
    undo: Callable[[bytes], bytes]
    growth: int = 1


SIGNED: Final = Conversion(flip_sign, flip_sign)
SIGNED_NIBBLES: Final = Conversion(flip_nibble_signs, flip_nibble_signs)
WIDENED: Final = Conversion(widen_bfloat16, narrow_to_bfloat16, 2)


@dataclass(frozen=True)
class Blob:
    """What a segment or a constant holds.

    Attributes:
        source: bytes made here, or where they lie in the store.
        conversion: how the store's bytes change; None when they are copied as they are.
    """

    source: bytes | Extent
    conversion: Conversion | None = None

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        if isinstance(self.source, bytes):
            return len(self.source)
        return self.source.nbytes * (self.conversion.growth if self.conversion else 1)

    def write(self, target: int, offset: int, sources: Callable[[Extent], int]) -> None:
        """Writes the bytes at an offset of a file, by the kernel alone where nothing changes.

        Args:
            target: descriptor of the file.
            offset: where to write.
            sources: gives an open descriptor of an extent's file.
        """
        if isinstance(self.source, bytes):
            _write(target, self.source, offset)
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
