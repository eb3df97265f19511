"""The .pte file: a program, and after it segments of constants, delegates and named weights."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporters.executorch.blobs import Blob
from exporters.executorch.flatbuffer import Record
from exporters.executorch.schemas import PROGRAM
from quant.store import Extent

SEGMENT_ALIGNMENT: Final = 128
CONSTANT_ALIGNMENT: Final = 16
# Right after the identifier: its own length, the program's, where segments begin, how long.
HEADER: Final = struct.Struct("<4sIQQQ")
HEADER_MAGIC: Final = b"eh00"
_HEADER_AT = 8
CONSTANTS_SEGMENT = 0


@dataclass(frozen=True)
class _Segment:
    offset: int
    nbytes: int
    parts: tuple[tuple[int, Blob], ...]  # offset within the segment, bytes


class PteFile:
    """Collects what a .pte holds, then writes it in one pass.

    Constants are tensors that operators outside the delegate read; named data are weights that
    delegates look up by key, so that several methods share them.
    """

    def __init__(self) -> None:
        self.plans: list[Record] = []
        self._constants: dict[str, Blob] = {}
        self._named: dict[str, Blob] = {}
        self._payloads: dict[bytes, int] = {}

    def constant(self, key: str, blob: Blob) -> int:
        """The buffer index of a constant; the same key is stored once. Index 0 means none."""
        self._constants.setdefault(key, blob)
        return 1 + list(self._constants).index(key)

    def named(self, key: str, blob: Blob) -> int:
        """Adds a weight under a key and returns its size in bytes."""
        return self._named.setdefault(key, blob).nbytes

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
                    "segments": [
                        Record("DataSegment", {"offset": s.offset, "size": s.nbytes})
                        for s in segments
                    ],
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
        base = _align(size, SEGMENT_ALIGNMENT)
        end = segments[-1].offset + segments[-1].nbytes
        header = HEADER.pack(HEADER_MAGIC, HEADER.size, size, base, end)
        root = struct.unpack_from("<I", program)[0] + HEADER.size
        head = struct.pack("<I", root) + program[4:_HEADER_AT] + header + program[_HEADER_AT:]
        with path.open("wb") as target, ExitStack() as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(target.fileno(), 0, base + end)
            target.write(head)
            target.flush()
            descriptors: dict[Path, int] = {}

            def source(extent: Extent) -> int:
                if extent.file not in descriptors:
                    stream = opened.enter_context(extent.file.open("rb"))
                    descriptors[extent.file] = stream.fileno()
                return descriptors[extent.file]

            for segment in segments:
                for at, blob in segment.parts:
                    blob.write(target.fileno(), base + segment.offset + at, source)

    def _segments(self) -> tuple[list[_Segment], list[int]]:
        """Every segment in its place, and the constants' offsets within theirs."""
        constants, offsets, at = [], [0], 0
        for blob in self._constants.values():
            offsets.append(at)
            constants.append((at, blob))
            at = _align(at + blob.nbytes, CONSTANT_ALIGNMENT)
        segments = [_Segment(0, at, tuple(constants))]
        blobs = [*map(Blob, self._payloads), *self._named.values()]
        for blob in blobs:
            start = _align(segments[-1].offset + segments[-1].nbytes, SEGMENT_ALIGNMENT)
            segments.append(_Segment(start, blob.nbytes, ((0, blob),)))
        return segments, offsets


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
