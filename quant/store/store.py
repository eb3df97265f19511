"""`WeightStore`: every stored tensor of a quantized model in one safetensors file.

The file is laid out before any weight is read, so parts are written in any order, from many
threads, straight to their places; readers map it. A store lives in a cache folder whose name is
a digest of what determines its bytes, so the same work is never done twice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from quant.errors import QuantizationError, StoreFullError
from quant.formats.formats import TensorLayout
from quant.plans.plan import QuantPlan, matrix_shape

Result = TypeVar("Result")

STORE_VERSION = 1
STORE_FILES = ("weights.safetensors", "store.json")
_FILE, _NOTES = STORE_FILES
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
# Wide elements first, so that every part is aligned to its own element without holes.
_ORDER = ("float32", "float16", "bfloat16", "uint8")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE_SECONDS = 24 * 3600  # no store takes a day: its writer was killed


@dataclass(frozen=True)
class Extent:
    """Where a part lies: ``nbytes`` bytes at ``offset`` of ``file``."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightNote:
    """How well one weight survived: relative L2 error of what is stored, 0 when it is exact."""

    relative_error: float


def store_key(
    source_digest: str, mapping_digest: str, plan: QuantPlan, calibration: str = ""
) -> str:
    """The name of the store that a checkpoint, a plan and a calibration give.

    Args:
        source_digest: digest of the checkpoint's files.
        mapping_digest: digest of the map from program weights to checkpoint tensors.
        plan: formats and algorithms.
        calibration: digest of the tokens that it calibrates on, empty where it needs none.
    """
    facts = (str(STORE_VERSION), source_digest, mapping_digest, plan.fingerprint())
    text = "\n".join((*facts, calibration) if calibration else facts)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _layout(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, str], TensorLayout]:
    parts = {
        (name, part): layout
        for name, assignment in plan.weights.items()
        for part, layout in assignment.layout(*matrix_shape(shapes[name])).items()
    }
    return dict(sorted(parts.items(), key=lambda item: _ORDER.index(item[1].dtype)))


class StoreWriter:
    """A store being filled; every part has its place from the start.

    Args:
        folder: an empty folder that the caller renames when the store is whole.
        plan: formats by weight.
        shapes: shape by weight.
        reopen: go on with the file that is there.

    Raises:
        QuantizationError: the file that is there is not of this plan's size.
    """

    def __init__(
        self,
        folder: Path,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        reopen: bool = False,
    ) -> None:
        self.folder, self.plan = folder, plan
        self._notes: dict[str, WeightNote] = {}
        self._parts = {
            name: assignment.layout(*matrix_shape(shapes[name]))
            for name, assignment in plan.weights.items()
        }
        header: dict[str, object] = {"__metadata__": {"format": "edgeforge", "version": "1"}}
        begin = 0
        for (name, part), layout in _layout(plan, shapes).items():
            header[f"{name}:{part}"] = {
                "dtype": _CODES[layout.dtype],
                "shape": list(layout.shape),
                "data_offsets": [begin, begin + layout.nbytes],
            }
            begin += layout.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)
        self._start = 8 + len(text)
        self._offsets = {
            name: self._start + row["data_offsets"][0]  # type: ignore[index]
            for name, row in header.items()
            if name != "__metadata__"
        }
        self.nbytes = self._start + begin
        new = 0 if reopen else os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(folder / _FILE, os.O_RDWR | new, 0o644)
        if reopen:
            found = os.fstat(self._descriptor).st_size
            if found != self.nbytes:
                os.close(self._descriptor)
                raise QuantizationError(
                    f"{folder / _FILE} has {found} bytes and not {self.nbytes}: remove the folder"
                )
            return
        try:
            _reserve(self._descriptor, self.nbytes)
            _write_all(self._descriptor, struct.pack("<Q", len(text)) + text, 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, weight: str, part: str, at: int, data: memoryview) -> None:
        """Writes bytes ``at`` an offset within a part; safe from several threads."""
        _write_all(self._descriptor, data, self._offsets[f"{weight}:{part}"] + at)

    def part(self, weight: str, part: str) -> torch.Tensor:
        """A part that is written already, read back."""
        layout = self._parts[weight][part]
        data = bytearray(layout.nbytes)
        _read_all(self._descriptor, memoryview(data), self._offsets[f"{weight}:{part}"])
        dtype: torch.dtype = getattr(torch, layout.dtype)
        return torch.frombuffer(data, dtype=dtype).view(layout.shape)

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        os.fsync(self._descriptor)

    def note(self, weight: str, relative_error: float) -> None:
        """Records how well a weight survived."""
        self._notes[weight] = WeightNote(relative_error)

    def finish(self) -> None:
        """Digests what was written, closes the file and writes the notes beside it."""
        try:
            digests = self._digests()
        finally:
            os.close(self._descriptor)
        notes = {
            "version": STORE_VERSION,
            "plan": self.plan.to_json(),
            "relative_error": {n: note.relative_error for n, note in self._notes.items()},
            "digests": digests,
        }
        (self.folder / _NOTES).write_text(json.dumps(notes, indent=1), encoding="utf-8")

    def _digests(self) -> dict[str, str]:
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(self._parts, pool.map(self._digest, self._parts), strict=True))

    def _digest(self, weight: str) -> str:
        parts = {}
        for part, layout in self._parts[weight].items():
            parts[part] = _file_blocks(
                self._descriptor, self._offsets[f"{weight}:{part}"], layout.nbytes
            )
        return weight_digest(parts)

    def abandon(self) -> None:
        """Closes the file of a store that will not be finished."""
        os.close(self._descriptor)


def weight_digest(parts: Mapping[str, Iterable[bytes | memoryview]]) -> str:
    """Digest of a weight's stored parts, whatever file holds them.

    Args:
        parts: the bytes of ``codes``, ``scale``, ``zero_point``, ``value`` or ``input_scale`` in
            blocks, laid out as `quant.formats.formats` says.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        digest.update(f"{part}:".encode())
        for block in parts[part]:
            digest.update(block)
    return digest.hexdigest()[:32]


def _file_blocks(descriptor: int, offset: int, nbytes: int) -> Iterator[bytes]:
    end = offset + nbytes
    while offset < end:
        block = os.pread(descriptor, min(1 << 20, end - offset), offset)
        if not block:
            raise QuantizationError("the weight store was cut short while it was written")
        yield block
        offset += len(block)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Takes the disk space at once, so that a full disk is met before the work, not after."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:  # macOS
        os.ftruncate(descriptor, nbytes)


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _read_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        read = os.preadv(descriptor, [view], offset)
        if not read:
            raise QuantizationError("the weight store was cut short while it was written")
        view, offset = view[read:], offset + read


class WeightStore:
    """A finished store, mapped for reading.

    Args:
        folder: where `StoreWriter` left it.

    Raises:
        QuantizationError: the folder holds no whole store, or one of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / _FILE
        try:
            notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
            if notes["version"] != STORE_VERSION:
                raise QuantizationError(f"{folder} holds a weight store of another version")
            self.plan = QuantPlan.from_json(notes["plan"])
            self.relative_error: dict[str, float] = dict(notes["relative_error"])
            self.digests: dict[str, str] = dict(notes["digests"])
            self._extents = _read_extents(self.file)
            with self.file.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except QuantizationError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise QuantizationError(f"{folder} holds no weight store: {error}") from error
        for held in (self.relative_error, self.digests, self._extents):
            if held.keys() != self.plan.weights.keys():
                raise QuantizationError(f"{folder} holds a part of a weight store only")

    def names(self) -> Iterator[str]:
        """Weight names in the plan's order."""
        return iter(self.plan.weights)

    def extents(self, weight: str) -> Mapping[str, Extent]:
        """Where each part of a weight lies in the file."""
        return self._extents[weight]

    def part(self, weight: str, part: str) -> torch.Tensor:
        """A part as a tensor over the map: no copy, and writing to it never reaches the file."""
        extent = self._extents[weight][part]
        count = 1
        for dim in extent.shape:
            count *= dim
        dtype = _TORCH[extent.dtype]
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=extent.offset)
        return flat.view(extent.shape)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.file.stat().st_size

    def release(self) -> None:
        """Tells the system that mapped pages are not needed now, so that they stop counting."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _read_extents(file: Path) -> dict[str, dict[str, Extent]]:
    """Where the parts lie, by weight and part.

    Raises:
        ValueError: the file is not as long as its header says. (Or another error of what a
            damaged header holds.)
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        start = 8 + length
        if start > size:
            raise ValueError("its header is cut short")
        header = json.loads(stream.read(length))
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
        raise ValueError(f"{_FILE} has {size} bytes and not {start + last}")
    return extents


@contextmanager
def new_store(
    cache: Path, key: str, plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[StoreWriter]:
    """A writer whose store appears under ``cache / key`` only when the block ends well.

    Args:
        cache: folder of stores.
        key: `store_key`.
        plan: formats by weight.
        shapes: shape by weight.

    Raises:
        StoreFullError: there is no room for the store.
        QuantizationError: the cache folder cannot be written.
    """
    partial = cache / f".{key}.partial-{os.getpid()}-{threading.get_ident()}"
    try:
        writer = or_explained(cache, lambda: _open_writer(partial, plan, shapes))
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        or_explained(cache, writer.finish)
        final = cache / key
        try:
            partial.rename(final)
        except OSError:  # another process was first; its bytes are the same
            if not (final / _NOTES).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_writer(
    partial: Path, plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
) -> StoreWriter:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for other in partial.parent.glob(".*.partial-*"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    partial.mkdir()
    return StoreWriter(partial, plan, shapes)


def or_explained(cache: Path, work: Callable[[], Result]) -> Result:
    """What some work on the cache gives; what the disk refuses becomes a sentence.

    The sentence is not raised `from` the system's error: whoever is writing an output folder
    around this would look through to it, and take that folder's disk for the full one.
    """
    try:
        return work()
    except OSError as error:
        number, words = error.errno, error.strerror
    if number in _OUT_OF_SPACE:
        raise StoreFullError(
            f"the cache of weight stores {cache} has no room for this model ({words}): free some "
            f"space, or set EDGEFORGE_CACHE to a folder on another disk"
        )
    raise QuantizationError(
        f"the cache of weight stores {cache} cannot be written ({words}): set EDGEFORGE_CACHE to "
        f"another folder"
    )


def find_store(cache: Path, key: str) -> WeightStore | None:
    """The finished store of this key, or None; a damaged one is removed.

    Damage is what a file's size shows: a disk that filled up or a copy that broke off.

    Raises:
        QuantizationError: a damaged store cannot be removed.
    """
    folder = cache / key
    if not folder.exists():
        return None
    try:
        return WeightStore(folder)
    except QuantizationError as damage:
        away = cache / f".{key}.partial-damaged-{os.getpid()}-{threading.get_ident()}"
        try:
            folder.rename(away)
        except FileNotFoundError:  # another process was first
            return None
        except OSError as error:
            raise QuantizationError(
                f"{damage}, and it cannot be removed ({error.strerror}): remove it yourself"
            ) from error
        shutil.rmtree(away, ignore_errors=True)
        return None
