"""The .pte file: a program, and after it segments of constants, delegates and named weights."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from exporters.executorch.blobs import Blob
from exporters.executorch.flatbuffer import Record
from exporters.executorch.method import ScalarType
from exporters.executorch.ptd_file import PtdFile
from exporters.executorch.schemas import PROGRAM
from exporters.executorch.segments import (
    SEGMENT_ALIGNMENT,
    Segment,
    align,
    append_segments,
    write_segments,
)

CONSTANT_ALIGNMENT: Final = 16
# Right after the identifier: its own length, the program's, where segments begin, how long.
HEADER: Final = struct.Struct("<4sIQQQ")
HEADER_MAGIC: Final = b"eh00"
_HEADER_AT = 8
CONSTANTS_SEGMENT = 0
# End the keys of an embedding's parts: in the layout of its kernel, or in the head's.
ROWS, HEAD_ROWS = "rows", "rows as the head's"
ROW_SCALE, WIDE_ROW_SCALE = "row scale", "row scale as the head's"


class PteFile:
    """Collects what a .pte holds, then writes it in one pass.

    Constants are tensors that operators outside the delegate read; named data are weights that
    delegates look up by key, so that several methods share them.

    Args:
        weights: where weights go instead, if anywhere.
    """

    def __init__(self, weights: PtdFile | None = None) -> None:
        self.weights = weights
        self.plans: list[Record] = []
        self._constants: dict[str, Blob] = {}
        self._named: dict[str, Blob] = {}
        self._payloads: dict[bytes, int] = {}

    def constant(self, key: str, blob: Blob) -> int:
        """The buffer index of a constant; the same key is stored once. Index 0 means none."""
        self._constants.setdefault(key, blob)
        return 1 + list(self._constants).index(key)

    def named(self, key: str, blob: Blob) -> int:
        """Adds a delegate's constant under a key and returns its size in bytes."""
        if self.weights is not None and is_weight(key):
            self.weights.add(key, blob)
            return blob.nbytes
        return self._named.setdefault(key, blob).nbytes

    def table(self, key: str, blob: Blob, dtype: ScalarType, shape: Sequence[int]) -> int | None:
        """The buffer index of a weight that kernels read; None when it lies in another file."""
        if self.weights is None:
            return self.constant(key, blob)
        self.weights.add(key, blob, (dtype, shape))
        return None

    def payload(self, data: bytes) -> int:
        """The segment of a delegate's program."""
        return 1 + self._payloads.setdefault(data, len(self._payloads))

    def write(self, path: Path) -> None:
        """Writes the file; weights are copied from the store, never held."""
        segments, offsets = self._segments()
        program = PROGRAM.encode(
            Record(
                "Program",
                {
                    "version": 0,
                    "execution_plan": self.plans,
                    "constant_buffer": [],
                    "backend_delegate_data": [],
                    "segments": [segment.record() for segment in segments],
                    "constant_segment": Record(
                        "SubsegmentOffsets",
                        {"segment_index": CONSTANTS_SEGMENT, "offsets": offsets},
                    ),
                    "named_data": [
                        Record(
                            "NamedData",
                            {"key": key, "segment_index": 1 + len(self._payloads) + index},
                        )
                        for index, key in enumerate(self._named)
                    ],
                },
            )
        )
        size = len(program) + HEADER.size
        base = align(size, SEGMENT_ALIGNMENT)
        end = segments[-1].offset + segments[-1].nbytes
        header = HEADER.pack(HEADER_MAGIC, HEADER.size, size, base, end)
        root = struct.unpack_from("<I", program)[0] + HEADER.size
        head = struct.pack("<I", root) + program[4:_HEADER_AT] + header + program[_HEADER_AT:]
        write_segments(path, head, base, segments)

    def _segments(self) -> tuple[list[Segment], list[int]]:
        """Every segment in its place, and the constants' offsets within theirs."""
        constants, offsets, at = [], [0], 0
        for blob in self._constants.values():
            offsets.append(at)
            constants.append((at, blob))
            at = align(at + blob.nbytes, CONSTANT_ALIGNMENT)
        segments = [Segment(0, at, tuple(constants))]
        append_segments(segments, [*map(Blob, self._payloads), *self._named.values()])
        return segments, offsets


def is_weight(key: str) -> bool:
    """Whether a key names a weight or a part of one, and not what the exporter made up.

    >>> is_weight("lm_head.weight scale"), is_weight("mean of 64")
    (True, False)
    """
    return key.partition(" ")[0].endswith(".weight")
