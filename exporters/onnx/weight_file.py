"""The external data file: it is planned first, then the store's bytes are copied into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from exporters.copying import copy_range
from quant.store.store import Extent

# ONNX Runtime memory-maps initializers that start on a page and reads the others into memory.
PAGE = 4096


@dataclass(frozen=True)
class Placed:
    """A place in the external data file: its offset and its size, in bytes."""

    offset: int
    nbytes: int


class WeightFile:
    """Plans where each part goes and writes the file; parts with equal keys are placed once.

    Args:
        name: the file's name within the artifact.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self._placed: dict[object, Placed] = {}
        self._copies: list[tuple[Extent, int]] = []
        self._bytes: list[tuple[bytes, int]] = []

    def place_extent(self, key: object, extent: Extent) -> Placed:
        """Returns a place for bytes of the store; an equal key gets the same place."""
        if key not in self._placed:
            self._placed[key] = self._reserve(extent.nbytes)
            self._copies.append((extent, self._placed[key].offset))
        return self._placed[key]

    def place_bytes(self, key: object, data: bytes) -> Placed:
        """Returns a place for bytes that are not in the store, such as rotary tables."""
        if key not in self._placed:
            self._placed[key] = self._reserve(len(data))
            self._bytes.append((data, self._placed[key].offset))
        return self._placed[key]

    def _reserve(self, nbytes: int) -> Placed:
        offset = -(-self.nbytes // PAGE) * PAGE
        self.nbytes = offset + nbytes
        return Placed(offset, nbytes)

    def write(self, folder: Path) -> None:
        """Writes the file; large parts never pass through this process's memory."""
        with (folder / self.name).open("wb") as target:
            if hasattr(os, "posix_fallocate") and self.nbytes:
                os.posix_fallocate(target.fileno(), 0, self.nbytes)
            for data, offset in self._bytes:
                target.seek(offset)
                target.write(data)
            target.flush()
            sources: dict[Path, int] = {}
            try:
                for extent, offset in self._copies:
                    if extent.file not in sources:
                        sources[extent.file] = os.open(extent.file, os.O_RDONLY)
                    copy_range(sources[extent.file], extent, target.fileno(), offset)
            finally:
                for descriptor in sources.values():
                    os.close(descriptor)
