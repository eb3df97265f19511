"""A tar of files, written nowhere: cut into chunks that bear the names of their digests."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from device_harness.errors import DeviceError

CHUNK: Final = 8 << 20
"""Bytes of one chunk."""
_PIECE: Final = 1 << 20
_BLOCK: Final = 512


@dataclass(frozen=True)
class Chunk:
    """A part of the archive.

    Attributes:
        at: its first byte.
        size: in bytes.
        sha256: of its bytes.
    """

    at: int
    size: int
    sha256: str


@dataclass(frozen=True)
class _Segment:
    """Bytes that are known, or a file of this host."""

    known: bytes
    file: Path | None
    size: int


class Archive:
    """A tar of files in the order of their names, the same bytes wherever it is made.

    Args:
        files: files of this host, by their path in the archive.
        chunk: bytes of one chunk.

    Raises:
        DeviceError: a file cannot be read.

    Attributes:
        size: bytes of the archive.
        unpacked_bytes: bytes of all files.
        digests: of each file, by its path in the archive.
        chunks: the parts, in order.
        name: a digest of the whole archive, by those of its parts.
    """

    def __init__(self, files: Mapping[str, Path], chunk: int = CHUNK) -> None:
        self._segments = list(_segments(files))
        self._chunk = chunk
        self.size = sum(segment.size for segment in self._segments)
        self.unpacked_bytes = sum(s.size for s in self._segments if s.file is not None)
        self.digests: dict[str, str] = {}
        by_file = {path: name for name, path in files.items()}
        self.chunks: list[Chunk] = []
        part, filled, at = hashlib.sha256(), 0, 0
        for segment in self._segments:
            file = hashlib.sha256()
            for piece in _pieces(segment, 0):
                file.update(piece)
                while piece:
                    head, piece = piece[: chunk - filled], piece[chunk - filled :]
                    part.update(head)
                    filled += len(head)
                    if filled == chunk:
                        self.chunks.append(Chunk(at, filled, part.hexdigest()))
                        at, part, filled = at + filled, hashlib.sha256(), 0
            if segment.file is not None:
                self.digests[by_file[segment.file]] = file.hexdigest()
        if filled:
            self.chunks.append(Chunk(at, filled, part.hexdigest()))
        parts = "".join(each.sha256 for each in self.chunks)
        self.name = hashlib.sha256(parts.encode()).hexdigest()[:32]

    def read(self, chunk: Chunk) -> Iterator[bytes]:
        """The bytes of a chunk, in pieces.

        Raises:
            DeviceError: a file cannot be read any more, or has changed.
        """
        begins, left, digest = 0, chunk.size, hashlib.sha256()
        for segment in self._segments:
            ends = begins + segment.size
            if ends > chunk.at and left:
                skipped = max(0, chunk.at - begins)
                for piece in _pieces(segment, skipped):
                    piece = piece[:left]
                    digest.update(piece)
                    left -= len(piece)
                    if not left and digest.hexdigest() != chunk.sha256:
                        raise DeviceError("a file changed while it was sent: run it again")
                    yield piece
                    if not left:
                        return
            begins = ends


def _segments(files: Mapping[str, Path]) -> Iterator[_Segment]:
    for name in sorted(files):
        path = files[name]
        try:
            status = path.stat()
        except OSError as error:
            raise DeviceError(f"{path} cannot be read: {error.strerror}") from error
        member = tarfile.TarInfo(name)
        member.size = status.st_size
        # The time says nothing and would make another archive of the same files.
        member.mode, member.mtime = (0o755 if status.st_mode & 0o100 else 0o644), 0
        head = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        yield _Segment(head, None, len(head))
        yield _Segment(b"", path, status.st_size)
        rest = -status.st_size % _BLOCK
        yield _Segment(bytes(rest), None, rest)
    yield _Segment(bytes(2 * _BLOCK), None, 2 * _BLOCK)


def _pieces(segment: _Segment, skipped: int) -> Iterator[bytes]:
    if segment.file is None:
        yield segment.known[skipped:]
        return
    left = segment.size - skipped
    try:
        with segment.file.open("rb", buffering=0) as file:
            file.seek(skipped, io.SEEK_SET)
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise DeviceError(f"{segment.file} became shorter while it was read")
                left -= len(piece)
                yield piece
    except OSError as error:
        raise DeviceError(f"{segment.file} cannot be read: {error.strerror}") from error
