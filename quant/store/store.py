"""`WeightStore`: every stored tensor of a quantized model in one safetensors file.

The file's layout is fixed before any weight is read, so many threads write parts in any order,
directly to their places (`quant.store.writer`). Readers map the file into memory. A store lies in a
cache, in a folder whose name is a digest of everything that determines the store's bytes
(`quant.store.cached`), so the same work is never done twice.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quant.errors import StoreDamagedError, StoreUnreadableError
from quant.input_files import NotRegularError, open_input, read_input
from quant.json_input import parse_json
from quant.plans.plan import QuantPlan
from quant.sealed_json import unseal

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

# Stores of version 1 have no checksums, and some hold other bytes than their names say: they were
# read from a checkpoint that changed meanwhile.
STORE_VERSION = 2
STORE_FILES = ("weights.safetensors", "store.json")
WEIGHTS_FILE, NOTES_FILE = STORE_FILES
_BLOCK_BYTES = 1 << 20
_LARGEST_NOTES = 64 << 20
# What the system says of a folder that holds something else than a store's files.
_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotRegularError)
# Python names it from 3.13 on; the number is that of x86 and ARM.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
# The names that torch gives the dtypes of the file.
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}


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


def checksums(parts: Mapping[str, Iterable[bytes | memoryview]]) -> dict[str, int]:
    """Returns CRC-32 of a weight's stored parts, which takes a fraction of the digest's time.

    Args:
        parts: by part name, the part's bytes in blocks.
    """
    found = {}
    for part, blocks in parts.items():
        found[part] = 0
        for block in blocks:
            found[part] = zlib.crc32(block, found[part])
    return found


def file_blocks(descriptor: int, offset: int, nbytes: int) -> Iterator[bytes]:
    """Yields bytes of a file, one block at a time.

    Raises:
        StoreDamagedError: the file ends before.
    """
    end = offset + nbytes
    while offset < end:
        block = os.pread(descriptor, min(_BLOCK_BYTES, end - offset), offset)
        if not block:
            raise StoreDamagedError("the file of a weight store is shorter than it was")
        yield block
        offset += len(block)


def readable(what: Path, work: Callable[[], Result]) -> Result:
    """Reads something of a store.

    Raises:
        StoreUnreadableError: the system does not let it be read; nothing is known of its content.
    """
    try:
        return work()
    except _NOT_THERE:
        raise
    except (OSError, MemoryError) as error:
        words = getattr(error, "strerror", None) or "out of memory"
        raise StoreUnreadableError(
            f"the weight store {what} cannot be read ({words}); it is left as it is: try again "
            f"when the cause is gone, or set EDGEFORGE_CACHE to another folder"
        ) from error


class WeightStore:
    """A finished store, mapped into memory for reading.

    Args:
        folder: the folder that `quant.store.writer.StoreWriter` filled.

    Raises:
        StoreDamagedError: the folder does not hold a complete store, or the store has another
            version.
        StoreUnreadableError: the system does not let it be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / WEIGHTS_FILE
        try:
            readable(folder, self._read)
        except (StoreDamagedError, StoreUnreadableError):
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise StoreDamagedError(f"{folder} holds no weight store: {error}") from error
        for held in (self.relative_error, self.digests, self._extents):
            if held.keys() != self.plan.weights.keys():
                raise StoreDamagedError(f"{folder} holds only a part of a weight store")

    def _read(self) -> None:
        """Reads the notes and the header, and maps the weights."""
        notes = unseal(read_input(self.folder / NOTES_FILE, _LARGEST_NOTES))
        if notes["version"] != STORE_VERSION:
            raise StoreDamagedError(
                f"{self.folder} holds a weight store of version {notes['version']!r}; this "
                f"EdgeForge reads version {STORE_VERSION}"
            )
        self.plan = QuantPlan.from_json(notes["plan"])
        self.relative_error: dict[str, float] = dict(notes["relative_error"])
        self.tokens: dict[str, int] = dict(notes.get("tokens", {}))
        self.digests: dict[str, str] = dict(notes["digests"])
        self._checksums: dict[str, dict[str, int]] = dict(notes["checksums"])
        header, self._extents = _read_header(self.file)
        if notes["header"] != zlib.crc32(header):
            raise ValueError("the header of its weights is damaged")
        with open_input(self.file) as stream:
            self._map = _mapped(stream.fileno())

    def check(self) -> None:
        """Reads all stored parts and holds them against their checksums.

        CRC-32 of 1 GB takes about half a second of a processor.

        Raises:
            StoreDamagedError: parts are not as they were written.
            StoreUnreadableError: the system does not let them be read.
        """
        with ThreadPoolExecutor(2) as pool:
            whole = readable(self.folder, lambda: list(pool.map(self._is_whole, self.names())))
        damaged = [name for name, good in zip(self.names(), whole, strict=True) if not good]
        if damaged:
            raise StoreDamagedError(
                f"{self.folder} holds {len(damaged)} of {len(whole)} weights otherwise than they "
                f"were written ({damaged[0]}{', ...' if damaged[1:] else ''})"
            )

    def _is_whole(self, weight: str) -> bool:
        with open_input(self.file) as stream:
            parts = {
                part: file_blocks(stream.fileno(), extent.offset, extent.nbytes)
                for part, extent in self._extents[weight].items()
            }
            return checksums(parts) == self._checksums.get(weight)

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
        import torch  # here, as an artifact's digests are read without it

        extent = self._extents[weight][part]
        count = 1
        for dim in extent.shape:
            count *= dim
        dtype = getattr(torch, _TORCH[extent.dtype])
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


def _mapped(descriptor: int) -> mmap.mmap:
    """Maps a whole file; what is written to the map stays in memory and never reaches the file.

    Linux sets memory aside for a map that may be written to, and refuses one larger than all of
    its memory, unless it is told that none is needed: a store may be larger than the machine.
    """
    if sys.platform != "linux":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_header(file: Path) -> tuple[bytes, dict[str, dict[str, Extent]]]:
    """Reads the file's header: its bytes, and the places of all parts by weight and part name.

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
        text = stream.read(length)
    header: Any = parse_json(text)
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
    return text, extents
