"""`WeightStore`: every stored tensor of a quantized model in one safetensors file.

The file's layout is fixed before any weight is read, so many threads write parts in any order,
directly to their places (`quant.store.writer`). Readers map the file into memory. A store lies in a
cache, in a folder whose name is a digest of everything that determines the store's bytes
(`quant.store.cached`), so the same work is never done twice.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.errors import QuantizationError
from quant.input_files import open_input, read_input
from quant.json_input import parse_json
from quant.plans.plan import QuantPlan

STORE_VERSION = 1
STORE_FILES = ("weights.safetensors", "store.json")
WEIGHTS_FILE, NOTES_FILE = STORE_FILES
_LARGEST_NOTES = 64 << 20
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Extent:
    """The place of a stored part: ``nbytes`` bytes at ``offset`` of ``file``."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def weight_digest(parts: Mapping[str, Iterable[bytes | memoryview]]) -> str:
    """Returns the digest of a weight's stored parts, which does not depend on the file they are in.

    Args:
        parts: by part name (``codes``, ``scale``, ``zero_point``, ``value``, ...), the part's bytes
            in blocks, laid out as `quant.formats.formats` describes.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        digest.update(f"{part}:".encode())
        for block in parts[part]:
            digest.update(block)
    return digest.hexdigest()[:32]


class WeightStore:
    """A finished store, mapped into memory for reading.

    Args:
        folder: the folder that `quant.store.writer.StoreWriter` filled.

    Raises:
        QuantizationError: the folder does not hold a complete store, or the store has another
            version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / WEIGHTS_FILE
        try:
            notes: Any = parse_json(read_input(folder / NOTES_FILE, _LARGEST_NOTES), strict=False)
            if notes["version"] != STORE_VERSION:
                raise QuantizationError(
                    f"{folder} holds a weight store of version {notes['version']!r}; this "
                    f"EdgeForge reads version {STORE_VERSION}"
                )
            self.plan = QuantPlan.from_json(notes["plan"])
            self.relative_error: dict[str, float] = dict(notes["relative_error"])
            self.digests: dict[str, str] = dict(notes["digests"])
            self._extents = _read_extents(self.file)
            with open_input(self.file) as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except QuantizationError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise QuantizationError(f"{folder} holds no weight store: {error}") from error
        for held in (self.relative_error, self.digests, self._extents):
            if held.keys() != self.plan.weights.keys():
                raise QuantizationError(f"{folder} holds only a part of a weight store")

    def names(self) -> Iterator[str]:
        """Weight names in the plan's order."""
        return iter(self.plan.weights)

    def extents(self, weight: str) -> Mapping[str, Extent]:
        """Returns the places of a weight's parts in the file, by part name."""
        return self._extents[weight]

    def part(self, weight: str, part: str) -> torch.Tensor:
        """Returns a part as a tensor over the mapped file, without a copy.

        Writing to the tensor never changes the file.
        """
        extent = self._extents[weight][part]
        count = 1
        for dim in extent.shape:
            count *= dim
        dtype = _TORCH[extent.dtype]
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=extent.offset)
        return flat.view(extent.shape)

    @property
    def nbytes(self) -> int:
        """The file's size in bytes."""
        return self.file.stat().st_size

    def release(self) -> None:
        """Tells the system to drop mapped pages, so that they do not count as resident memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _read_extents(file: Path) -> dict[str, dict[str, Extent]]:
    """Reads the places of all parts from the file's header, by weight name and part name.

    Raises:
        ValueError: the file's length differs from what its header says. A damaged header raises
            other errors too, all of which `WeightStore` handles.
    """
    size = file.stat().st_size
    with open_input(file) as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        start = 8 + length
        if start > size:
            raise ValueError("its header is cut short")
        header: Any = parse_json(stream.read(length))
    extents: dict[str, dict[str, Extent]] = {}
    last = 0
    for key, row in header.items():
        if key == "__metadata__":
            continue
        name, _, part = key.rpartition(":")
        begin, end = row["data_offsets"]
        extents.setdefault(name, {})[part] = Extent(
            file, start + begin, end - begin, row["dtype"], tuple(row["shape"])
        )
        last = max(last, end)
    if size != start + last:
        raise ValueError(f"{WEIGHTS_FILE} has {size} bytes and not {start + last}")
    return extents
