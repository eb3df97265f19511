"""Writes ``weight.bin``: it is planned first, then the store's bytes are streamed into it.

The layout is that of Core ML's blob storage, version 2: a header, then each blob's record and data,
both at multiples of 64 bytes. Elements of less than a byte are packed low bits first.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from exporters.coreml.blob_file import ALIGNMENT, BITS, BLOB_TYPES, SENTINEL, VERSION
from quant.store.store import Extent

HEADER: Final = struct.Struct("<II56x")  # the number of blobs, the version
# Sentinel, dtype, size of the data in bytes, its offset, padding bits of the last byte.
RECORD: Final = struct.Struct("<IIQQQ32x")


class Blob(Protocol):
    """Bytes to be written, such as an `exporters.blobs.Blob`."""

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""

    def write(self, target: int, offset: int, sources: Callable[[Extent], int]) -> None:
        """Writes the bytes at an offset of a file."""


@dataclass(frozen=True)
class PlacedBlob:
    """A blob with its place in the file.

    Attributes:
        offset: the offset of its record, by which models name the blob, in bytes.
        dtype: MIL's name of the element type.
        count: the number of elements.
        blob: the bytes.
    """

    offset: int
    dtype: str
    count: int
    blob: Blob

    @property
    def data_offset(self) -> int:
        """The offset of its data, in bytes."""
        return self.offset + ALIGNMENT

    def record(self) -> bytes:
        """The record, which the file holds before the data."""
        padding = 8 * self.blob.nbytes - BITS[self.dtype] * self.count
        code = BLOB_TYPES[self.dtype]
        return RECORD.pack(SENTINEL, code, self.blob.nbytes, self.data_offset, padding)


class WeightFile:
    """Plans where each blob goes, and writes them."""

    def __init__(self) -> None:
        self.nbytes = HEADER.size
        self._placed: dict[object, PlacedBlob] = {}

    def place(self, key: object, dtype: str, count: int, blob: Blob) -> int:
        """Returns the offset of a blob's record; an equal key gets the same place.

        Args:
            key: identifies the blob's content.
            dtype: MIL's name of the element type.
            count: the number of elements.
            blob: the bytes of the elements.
        """
        if key not in self._placed:
            assert blob.nbytes == -(-count * BITS[dtype] // 8), f"{key}: {blob.nbytes}"
            offset = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
            self._placed[key] = PlacedBlob(offset, dtype, count, blob)
            self.nbytes = offset + ALIGNMENT + blob.nbytes
        return self._placed[key].offset

    def write(self, path: Path) -> None:
        """Writes the file; memory holds at most one chunk of a blob."""
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


def append(path: Path, blobs: Sequence[tuple[str, int, Blob]]) -> list[int]:
    """Adds blobs at the end of a file; those that are there keep their places and bytes.

    A file that has another name, too, is copied first: that name may be another artifact's.

    Args:
        path: the file.
        blobs: of each the dtype, the number of elements, and the bytes, which no store holds.

    Returns:
        The offset of each blob's record.
    """
    if path.stat().st_nlink > 1:
        beside = path.with_name(f".{path.name}.partial")
        shutil.copyfile(path, beside)
        os.replace(beside, path)
    target = os.open(path, os.O_RDWR)
    try:
        count, version = HEADER.unpack(os.pread(target, HEADER.size, 0))
        end, offsets = os.fstat(target).st_size, []
        for dtype, elements, blob in blobs:
            placed = PlacedBlob(-(-end // ALIGNMENT) * ALIGNMENT, dtype, elements, blob)
            os.pwrite(target, placed.record(), placed.offset)
            blob.write(target, placed.data_offset, _no_store)
            end = placed.data_offset + blob.nbytes
            offsets.append(placed.offset)
        os.pwrite(target, HEADER.pack(count + len(blobs), version), 0)
    finally:
        os.close(target)
    return offsets


def _no_store(extent: Extent) -> int:
    raise AssertionError(f"{extent} lies in a store")
