"""The .pte file: a program, then segments with constants, delegates' programs and named weights."""

from __future__ import annotations

import shutil
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
# Right after the identifier: the magic number, the header's own length, the program's length, the
# offset and the length of the segments.
HEADER: Final = struct.Struct("<4sIQQQ")
HEADER_MAGIC: Final = b"eh00"
_HEADER_AT = 8
CONSTANTS_SEGMENT = 0
# The ends of the keys of an embedding's parts, in its kernel's layout or in the head's.
ROWS, HEAD_ROWS = "rows", "rows as the head's"
ROW_SCALE, WIDE_ROW_SCALE = "row scale", "row scale as the head's"


class PteFile:
    """Collects the content of a .pte, then writes it in one pass.

    Constants are tensors that kernels outside the delegates read. Named data are weights that
    delegates look up by key, so that several methods share them.

    Args:
        weights: the .ptd that takes the weights instead; None when the .pte holds them.

    Attributes:
        experts: the segments of experts' delegates, by the name of each expert's last weight and
            the shape of its tokens. Methods share them, so that each is encoded once.
    """

    def __init__(self, weights: PtdFile | None = None) -> None:
        self.weights = weights
        self.plans: list[Record] = []
        self._constants: dict[str, Blob] = {}
        self._numbers: dict[str, int] = {}  # of the constants
        self._named: dict[str, Blob] = {}
        self._payloads: dict[bytes, int] = {}
        self.experts: dict[tuple[str, tuple[int, ...]], int] = {}

    def constant(self, key: str, blob: Blob) -> int:
        """Returns a constant's buffer index, from 1 on; constants of equal keys are stored once."""
        self._constants.setdefault(key, blob)
        return self._numbers.setdefault(key, len(self._constants))

    def named(self, key: str, blob: Blob) -> int:
        """Adds a delegate's constant under a key and returns its size in bytes."""
        if self.weights is not None and is_weight(key):
            self.weights.add(key, blob)
            return blob.nbytes
        return self._named.setdefault(key, blob).nbytes

    def table(self, key: str, blob: Blob, dtype: ScalarType, shape: Sequence[int]) -> int | None:
        """Adds a weight that kernels read; returns its buffer index, or None for the .ptd."""
        if self.weights is None:
            return self.constant(key, blob)
        self.weights.add(key, blob, (dtype, shape))
        return None

    def payload(self, data: bytes) -> int:
        """Adds a delegate's program and returns the number of its segment."""
        return 1 + self._payloads.setdefault(data, len(self._payloads))

    def write(self, path: Path) -> None:
        """Writes the file; weights are copied from the store without being held in memory."""
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
        head, base = _head(program, segments[-1].offset + segments[-1].nbytes)
        write_segments(path, head, base, segments)

    def _segments(self) -> tuple[list[Segment], list[int]]:
        """All segments with their places, and the constants' offsets within the first segment."""
        constants, offsets, at = [], [0], 0
        for blob in self._constants.values():
            offsets.append(at)
            constants.append((at, blob))
            at = align(at + blob.nbytes, CONSTANT_ALIGNMENT)
        segments = [Segment(0, at, tuple(constants))]
        append_segments(segments, [*map(Blob, self._payloads), *self._named.values()])
        return segments, offsets


def is_weight(key: str) -> bool:
    """Whether a key names a weight or a part of one, and not a constant that the exporter adds.

    >>> is_weight("lm_head.weight scale"), is_weight("lm_head.bias"), is_weight("mean of 64")
    (True, True, False)
    """
    return key.partition(" ")[0].endswith((".weight", ".bias"))


def _head(program: bytes, nbytes: int) -> tuple[bytes, int]:
    """What stands before the segments, and the offset of the first; ``nbytes`` of them follow."""
    size = len(program) + HEADER.size
    base = align(size, SEGMENT_ALIGNMENT)
    header = HEADER.pack(HEADER_MAGIC, HEADER.size, size, base, nbytes)
    root = struct.unpack_from("<I", program)[0] + HEADER.size
    head = struct.pack("<I", root) + program[4:_HEADER_AT] + header + program[_HEADER_AT:]
    return head, base


def rewrite(file: Path, program: Record, added: Sequence[bytes], out: Path) -> None:
    """Writes a file with another program, the same segments, and further ones behind them.

    Args:
        file: the .pte whose segments are copied, a part at a time.
        program: the new program, whose ``segments`` are still those of the file.
        added: the content of further segments, whose numbers follow those of the file.
        out: the new file.
    """
    with file.open("rb") as source, out.open("wb") as target:
        source.seek(_HEADER_AT)
        *_, old_base, end = HEADER.unpack(source.read(HEADER.size))
        places, total = [], end
        for data in added:
            places.append(align(total, SEGMENT_ALIGNMENT))
            total = places[-1] + len(data)
        segments = [
            *program["segments"],
            *(Segment(at, len(data), ()).record() for at, data in zip(places, added, strict=True)),
        ]
        encoded = PROGRAM.encode(Record(program.table, {**program.fields, "segments": segments}))
        head, base = _head(encoded, total)
        target.write(head)
        target.seek(base)
        source.seek(old_base)
        shutil.copyfileobj(source, target, 1 << 20)
        for at, data in zip(places, added, strict=True):
            target.seek(base + at)
            target.write(data)
