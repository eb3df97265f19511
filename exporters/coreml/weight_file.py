"""``weight.bin``: planned first, then streamed from the store; equal blobs are placed once.

The layout is that of Core ML's blob storage, version 2: a header, then for each blob a record
and its data, both on 64 bytes. Sub-byte elements are packed low bits first.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from exporters.coreml.blob_file import ALIGNMENT, BITS, BLOB_TYPES, SENTINEL, VERSION
from quant.store.store import Extent

HEADER: Final = struct.Struct("<II56x")  # blobs, version
# Sentinel, dtype, bytes, offset of the data, bits of the last byte that are no element.
RECORD: Final = struct.Struct("<IIQQQ32x")


class Blob(Protocol):
    """Bytes to be written, such as an `exporters.blobs.Blob`."""

    @property
    def nbytes(self) -> int:
        """Size in the file."""

    def write(self, target: int, offset: int, sources: Callable[[Extent], int]) -> None:
        """Writes the bytes at an offset of a file."""


@dataclass(frozen=True)
class PlacedBlob:
    """A blob of the file.

    Attributes:
        offset: of its record, by which models name it.
        dtype: of its elements.
        count: how many there are.
        blob: what it holds.
    """

    offset: int
    dtype: str
    count: int
    blob: Blob

    @property
    def data_offset(self) -> int:
        """Where its data begin."""
        return self.offset + ALIGNMENT

    def record(self) -> bytes:
        """What stands before the data."""
        padding = 8 * self.blob.nbytes - BITS[self.dtype] * self.count
        code = BLOB_TYPES[self.dtype]
        return RECORD.pack(SENTINEL, code, self.blob.nbytes, self.data_offset, padding)


class WeightFile:
    """Plans where each blob goes, and writes them."""

    def __init__(self) -> None:
        self.nbytes = HEADER.size
        self._placed: dict[object, PlacedBlob] = {}

    def place(self, key: object, dtype: str, count: int, blob: Blob) -> int:
        """The offset of a blob's record; the same key gets the same place again.

        Args:
            key: of what the blob holds.
            dtype: as MIL names it.
            count: elements.
            blob: their bytes.
        """
        if key not in self._placed:
            assert blob.nbytes == -(-count * BITS[dtype] // 8), f"{key}: {blob.nbytes}"
            offset = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
            self._placed[key] = PlacedBlob(offset, dtype, count, blob)
            self.nbytes = offset + ALIGNMENT + blob.nbytes
        return self._placed[key].offset

    def write(self, path: Path) -> None:
        """Writes the file; memory holds a chunk of a blob at most."""
        sources: dict[Path, int] = {}

        def source(extent: Extent) -> int:
            if extent.file not in sources:
                sources[extent.file] = os.open(extent.file, os.O_RDONLY)
            return sources[extent.file]

        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(target, 0, self.nbytes)
            os.pwrite(target, HEADER.pack(len(self._placed), VERSION), 0)
            for placed in self._placed.values():
                os.pwrite(target, placed.record(), placed.offset)
                placed.blob.write(target, placed.data_offset, source)
        finally:
            os.close(target)
            for descriptor in sources.values():
                os.close(descriptor)
