"""The segments at the end of both of ExecuTorch's file formats, each at a multiple of 128 bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporters.executorch.blobs import Blob
from exporters.executorch.flatbuffer import Record
from quant.store.store import Extent

SEGMENT_ALIGNMENT: Final = 128


@dataclass(frozen=True)
class Segment:
    """A segment of a file.

    Attributes:
        offset: its offset from the first segment, in bytes.
        nbytes: its size, in bytes.
        parts: the blobs that it holds, each with its offset within the segment.
    """

    offset: int
    nbytes: int
    parts: tuple[tuple[int, Blob], ...]

    def record(self) -> Record:
        """The ``DataSegment`` that states its place."""
        return Record("DataSegment", {"offset": self.offset, "size": self.nbytes})


def append_segments(segments: list[Segment], blobs: Iterable[Blob]) -> None:
    """Appends one segment for each blob, after those that are there."""
    for blob in blobs:
        end = segments[-1].offset + segments[-1].nbytes if segments else 0
        segments.append(Segment(align(end, SEGMENT_ALIGNMENT), blob.nbytes, ((0, blob),)))


def check_segments(segments: Sequence[tuple[int, int]], size: int) -> None:
    """Checks the offset and the size of each segment of a file of ``size`` bytes.

    Raises:
        ValueError: one lies past the end, or they overlap.
    """
    if any(offset + nbytes > size for offset, nbytes in segments):
        raise ValueError("a segment lies past the end")
    if sum(nbytes for _, nbytes in segments) > size:
        raise ValueError("segments overlap")


def write_segments(path: Path, head: bytes, base: int, segments: Sequence[Segment]) -> None:
    """Writes a file: its head, then from ``base`` on its segments, copied from the store."""
    end = segments[-1].offset + segments[-1].nbytes
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


def align(size: int, alignment: int) -> int:
    """Rounds a size up to a multiple of the alignment.

    >>> align(129, 128)
    256
    """
    return -(-size // alignment) * alignment
