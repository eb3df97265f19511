"""The .ptd file: weights by key for a .pte that holds none, in ExecuTorch's flat tensor format.

Several keys may name one blob: XNNPACK asks for a matrix by one key, and an embedding kernel asks
for the same bytes as a tensor by another.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.executorch.blobs import Blob
from exporters.executorch.flatbuffer import Record
from exporters.executorch.method import SCALAR_TYPES, ScalarType
from exporters.executorch.schemas import FLAT_TENSOR
from exporters.executorch.segments import (
    SEGMENT_ALIGNMENT,
    Segment,
    align,
    append_segments,
    check_segments,
    write_segments,
)
from quant.input_files import open_input

# After the identifier: the magic number, the header's own length, the offset and the length of the
# tables, the offset and the length of the segments. Padded to a multiple of 16 bytes.
HEADER: Final = struct.Struct("<4sIQQQQ8x")
HEADER_MAGIC: Final = b"FH01"
_HEADER_AT, _HEADER_LENGTH = 8, 40
# The .ptd holds a digest of its weights under the first key, and its .pte holds the same digest
# under the second, so that a .ptd with other weights is recognized.
MARK, MARK_OF_PTE = "edgeforge weights", "edgeforge weights are external"


class PtdFile:
    """Collects weights, then writes them in one pass."""

    def __init__(self) -> None:
        self._blobs: dict[Blob, int] = {}
        self._named: dict[str, Record] = {}

    def add(
        self, key: str, blob: Blob, tensor: tuple[ScalarType, Sequence[int]] | None = None
    ) -> None:
        """Adds a blob under a key; equal blobs are stored once.

        Args:
            key: the key by which the program names it.
            blob: the bytes.
            tensor: the dtype and the shape, where a kernel reads it as a tensor.
        """
        layout = None
        if tensor is not None:
            dtype, shape = tensor
            order = list(range(len(shape)))
            layout = Record(
                "TensorLayout",
                {
                    "scalar_type": SCALAR_TYPES[dtype][0],
                    "sizes": list(shape),
                    "dim_order": order,
                },
            )
        index = self._blobs.setdefault(blob, len(self._blobs))
        if key not in self._named or layout is not None:
            named = {"key": key, "segment_index": index, "tensor_layout": layout}
            self._named[key] = Record("NamedData", named)

    def write(self, path: Path) -> None:
        """Writes the file; weights are copied from the store without being held in memory."""
        segments: list[Segment] = []
        append_segments(segments, self._blobs)
        tables = FLAT_TENSOR.encode(
            Record(
                "FlatTensor",
                {
                    "version": 0,
                    "segments": [segment.record() for segment in segments],
                    "named_data": list(self._named.values()),
                },
            )
        )
        base = align(len(tables) + HEADER.size, SEGMENT_ALIGNMENT)
        end = segments[-1].offset + segments[-1].nbytes
        header = HEADER.pack(HEADER_MAGIC, _HEADER_LENGTH, HEADER.size, len(tables), base, end)
        root = struct.unpack_from("<I", tables)[0] + HEADER.size
        head = struct.pack("<I", root) + tables[4:_HEADER_AT] + header + tables[_HEADER_AT:]
        write_segments(path, head, base, segments)


@dataclass(frozen=True)
class Ptd:
    """An opened .ptd.

    Attributes:
        file: its path.
        named: the offset in the file and the size of each blob, in bytes, by key.
        layouts: the dtype's number and the shape of each blob that is a tensor, by key.
    """

    file: Path
    named: Mapping[str, tuple[int, int]]
    layouts: Mapping[str, tuple[int, tuple[int, ...]]]

    def mark(self) -> bytes:
        """The digest that identifies its weights; empty when the file has none."""
        return read_at(self.file, *self.named.get(MARK, (0, 0)))


def read_ptd(file: Path) -> Ptd:
    """Opens a .ptd and reads its tables; it does not read the weights.

    Raises:
        ExportError: the file is missing, cut short, damaged, or has another schema.
    """
    with _one_sentence(file):
        with open_input(file) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            start = stream.read(_HEADER_AT + HEADER.size)
            if start[4:8] != FLAT_TENSOR.identifier or start[8:12] != HEADER_MAGIC:
                raise ExportError(
                    f"{file} holds no weights of the schema {FLAT_TENSOR.identifier.decode()}: "
                    f"replace it by the file that was written with the program"
                )
            _, _, at, length, base, total = HEADER.unpack_from(start, _HEADER_AT)
            if base + total > size:
                raise ExportError(
                    f"{file} was cut short: it has {size} bytes and not {base + total}"
                )
            stream.seek(0)
            tables = FLAT_TENSOR.decode(stream.read(min(at + length, size)), "FlatTensor")
        segments = [(base + row["offset"], row["size"]) for row in tables["segments"]]
        check_segments(segments, size)
        rows = tables["named_data"]
        named = {row["key"]: segments[row["segment_index"]] for row in rows}
        layouts = {
            row["key"]: (row["tensor_layout"]["scalar_type"], tuple(row["tensor_layout"]["sizes"]))
            for row in rows
            if row["tensor_layout"] is not None
        }
    return Ptd(file, named, layouts)


@contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    with one_sentence(file, "ExecuTorch's weights"):
        try:
            yield
        except OSError as error:
            raise ExportError(
                f"{file} cannot be read: {error.strerror}; the program beside it has its weights "
                f"there"
            ) from error


def weights_mark(digests: Mapping[str, str]) -> bytes:
    """A digest of all weights, computed from the digest of each."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).digest()


def read_at(file: Path, offset: int, nbytes: int) -> bytes:
    """Reads ``nbytes`` bytes of a file from an offset."""
    with open_input(file) as stream:
        stream.seek(offset)
        return stream.read(nbytes)
