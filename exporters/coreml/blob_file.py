"""Reads Core ML's ``weight.bin``, version 2, through a memory map, so that bytes are read on use.

The file begins with a 64-byte header: the number of blobs, the version. A blob consists of data and
of 64 bytes of metadata at a multiple of 64: a sentinel, the element type, the size of the data in
bytes, the data's offset, and how many bits of the last byte are padding. Elements of less than a
byte are packed low bits first and may cross bytes. A constant names a blob by the offset of its
metadata.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from exporters.errors import ExportError
from quant.input_files import open_input

VERSION: Final = 2
ALIGNMENT: Final = 64
SENTINEL: Final = 0xDEADBEEF
# The format's numbers of element types, by MIL's names.
BLOB_TYPES: Final[dict[str, int]] = {
    "fp16": 1,
    "fp32": 2,
    "uint8": 3,
    "int8": 4,
    "bf16": 5,
    "int16": 6,
    "uint16": 7,
    "int4": 8,
    "uint1": 9,
    "uint2": 10,
    "uint4": 11,
    "uint3": 12,
    "uint6": 13,
    "int32": 14,
    "uint32": 15,
    "fp8e4m3fn": 16,
    "fp8e5m2": 17,
}
BLOB_TYPE_NAMES: Final = {code: name for name, code in BLOB_TYPES.items()}
BITS: Final[dict[str, int]] = {
    "bool": 8,
    "fp16": 16,
    "fp32": 32,
    "fp64": 64,
    "bf16": 16,
    "int8": 8,
    "int16": 16,
    "int32": 32,
    "int64": 64,
    "int4": 4,
    "uint8": 8,
    "uint16": 16,
    "uint32": 32,
    "uint64": 64,
    "uint4": 4,
    "uint2": 2,
    "uint1": 1,
    "uint6": 6,
    "uint3": 3,
    "fp8e4m3fn": 8,
    "fp8e5m2": 8,
}

_HEADER: Final = struct.Struct("<II")
_METADATA: Final = struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class Blob:
    """One constant's bytes.

    Attributes:
        dtype: MIL's name of the element type.
        elements: how many elements there are.
        data: uint8 ``[ceil(elements * bits / 8)]``, a view of the mapped file. Pages that are read
            through it stay resident as long as the file is mapped.
        file: the weight file.
        start: where the bytes begin in it.
    """

    dtype: str
    elements: int
    data: npt.NDArray[np.uint8]
    file: Path
    start: int

    def blocks(self, size: int) -> Iterator[bytes]:
        """Yields the bytes, at most ``size`` at a time.

        They are read from the file and not through the map, so that none of them stays resident.

        Raises:
            ExportError: the file cannot be read, or was cut short since it was opened.
        """
        left = self.data.nbytes
        try:
            with open_input(self.file) as stream:
                stream.seek(self.start)
                while left:
                    block = stream.read(min(size, left))
                    if not block:
                        raise ExportError(f"{self.file} is {left} bytes too short")
                    left -= len(block)
                    yield block
        except OSError as error:
            raise _unreadable(self.file, error) from error


class BlobFile:
    """A weight file, mapped into memory.

    Args:
        path: the file.

    Raises:
        ExportError: the file cannot be read, or is not a weight file of version 2.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_input(path) as stream:
                self.size = stream.seek(0, 2)
                empty = self.size == 0
                self._map = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _unreadable(path, error) from error
        if self.size < ALIGNMENT:
            raise ExportError(
                f"{path} has {self.size} bytes, less than the {ALIGNMENT} of a weight file's "
                f"header: the file was cut short; copy the package again"
            )
        self.blobs, version = _HEADER.unpack_from(self._map)
        if version != VERSION:
            raise ExportError(
                f"{path} is a weight file of version {version}; EdgeForge reads version {VERSION}"
            )

    def read(self, offset: int) -> Blob:
        """Returns the blob whose metadata is at ``offset``.

        Raises:
            ExportError: there is no blob, or its data does not lie within the file.
        """
        if offset < ALIGNMENT or offset + ALIGNMENT > self.size:
            raise ExportError(
                f"a constant is at offset {offset} of {self.path}, which has {self.size} bytes: "
                f"the file was cut short or belongs to another package"
            )
        sentinel, code, size, start, padding = _METADATA.unpack_from(self._map, offset)
        if sentinel != SENTINEL:
            raise ExportError(
                f"there is no constant at offset {offset} of {self.path}: its mark is "
                f"{sentinel:#x}, not {SENTINEL:#x}; the file was changed or belongs to another "
                f"package"
            )
        if code not in BLOB_TYPE_NAMES:
            raise ExportError(
                f"the constant at offset {offset} of {self.path} has the unknown element type "
                f"{code}; known are 1 to {max(BLOB_TYPE_NAMES)}"
            )
        if start < ALIGNMENT or start > self.size or size > self.size - start:
            raise ExportError(
                f"the constant at offset {offset} of {self.path} takes {size} bytes from {start}, "
                f"past the file's end at {self.size}: the file was cut short or changed"
            )
        dtype = BLOB_TYPE_NAMES[code]
        bits = BITS[dtype]
        used = size * 8 - (padding if bits < 8 else 0)
        if used < 0 or used % bits:
            raise ExportError(
                f"the constant at offset {offset} of {self.path} takes {size} bytes minus "
                f"{padding} bits, which is not a whole number of {dtype} elements: the file was "
                f"changed"
            )
        data = np.frombuffer(self._map, np.uint8, size, start)
        return Blob(dtype, used // bits, data, self.path, start)


def _unreadable(path: Path, error: OSError) -> ExportError:
    return ExportError(f"the weight file {path} cannot be read: {error.strerror or error}")
