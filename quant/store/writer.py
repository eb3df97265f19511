"""Writes a weight store, in which every part has its place before any weight is read."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from quant.errors import StoreDamagedError
from quant.formats.formats import TensorLayout
from quant.plans.plan import QuantPlan, matrix_shape
from quant.sealed_json import seal
from quant.store.store import (
    NOTES_FILE,
    STORE_VERSION,
    WEIGHTS_FILE,
    checksums,
    file_blocks,
    weight_digest,
)

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
# Wide elements come first: then every part is aligned to its element size without padding.
_ORDER = ("float32", "float16", "bfloat16", "uint8")


@dataclass(frozen=True)
class WeightNote:
    """What is noted of one weight.

    Attributes:
        relative_error: the relative L2 error of its stored values; 0 when they are exact.
        tokens: of an expert's matrix, how many calibration tokens chose the expert; None of others.
    """

    relative_error: float
    tokens: int | None = None


class StoreWriter:
    """Creates a store's file with the places of all parts, and fills it.

    Args:
        folder: an empty folder, which the caller renames when the store is complete.
        plan: formats by weight name.
        shapes: shape by weight name.
        reopen: whether to continue with the existing file.

    Raises:
        StoreDamagedError: the existing file does not have the size or the header of this plan's
            store.
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
        self._header = text
        self._start = 8 + len(text)
        self._offsets = {
            name: self._start + row["data_offsets"][0]  # type: ignore[index]
            for name, row in header.items()
            if name != "__metadata__"
        }
        self.nbytes = self._start + begin
        new = 0 if reopen else os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(folder / WEIGHTS_FILE, os.O_RDWR | new, 0o644)
        head = struct.pack("<Q", len(text)) + text
        try:
            if reopen:
                self._require_this_store(head)
                return
            _reserve(self._descriptor, self.nbytes)
            _write_all(self._descriptor, head, 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _require_this_store(self, head: bytes) -> None:
        """Refuses a file that is not the one that was begun for this plan."""
        found = os.fstat(self._descriptor).st_size
        if found != self.nbytes:
            raise StoreDamagedError(
                f"{self.folder / WEIGHTS_FILE} has {found} bytes and not the {self.nbytes} of this "
                f"plan's store"
            )
        if os.pread(self._descriptor, len(head), 0) != head:
            raise StoreDamagedError(
                f"{self.folder / WEIGHTS_FILE} does not begin as this plan's store does"
            )

    def write(self, weight: str, part: str, at: int, data: memoryview) -> None:
        """Writes bytes at offset ``at`` of a part; safe from several threads."""
        _write_all(self._descriptor, data, self._offsets[f"{weight}:{part}"] + at)

    def part(self, weight: str, part: str) -> torch.Tensor:
        """Reads back a part that is already written."""
        layout = self._parts[weight][part]
        data = bytearray(layout.nbytes)
        _read_all(self._descriptor, memoryview(data), self._offsets[f"{weight}:{part}"])
        dtype: torch.dtype = getattr(torch, layout.dtype)
        return torch.frombuffer(data, dtype=dtype).view(layout.shape)

    def sync(self) -> None:
        """Waits until everything written is on the disk."""
        os.fsync(self._descriptor)

    def note(self, weight: str, relative_error: float, tokens: int | None = None) -> None:
        """Records what `WeightNote` holds of a weight."""
        self._notes[weight] = WeightNote(relative_error, tokens)

    def finish(self) -> None:
        """Digests the written parts, closes the file and writes the notes beside it."""
        try:
            with ThreadPoolExecutor(2) as pool:
                found = dict(zip(self._parts, pool.map(self._digests, self._parts), strict=True))
        finally:
            os.close(self._descriptor)
        notes = {
            "version": STORE_VERSION,
            "plan": self.plan.to_json(),
            "relative_error": {n: note.relative_error for n, note in self._notes.items()},
            "tokens": {
                n: note.tokens for n, note in self._notes.items() if note.tokens is not None
            },
            "digests": {name: digest for name, (digest, _) in found.items()},
            "checksums": {name: sums for name, (_, sums) in found.items()},
            "header": zlib.crc32(self._header),
        }
        (self.folder / NOTES_FILE).write_text(seal(notes, indent=1), encoding="utf-8")

    def checksums(self, weight: str) -> dict[str, int]:
        """Reads a weight back and returns the checksums of its parts."""
        return checksums(self._blocks(weight))

    def _digests(self, weight: str) -> tuple[str, dict[str, int]]:
        """Returns the digest and the checksums of a weight, which is read once for both."""
        sums: dict[str, int] = {}

        def counted(part: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
            sums[part] = 0
            for block in blocks:
                sums[part] = zlib.crc32(block, sums[part])
                yield block

        parts = {part: counted(part, blocks) for part, blocks in self._blocks(weight).items()}
        return weight_digest(parts), sums

    def _blocks(self, weight: str) -> dict[str, Iterator[bytes]]:
        return {
            part: file_blocks(self._descriptor, self._offsets[f"{weight}:{part}"], layout.nbytes)
            for part, layout in self._parts[weight].items()
        }

    def abandon(self) -> None:
        """Closes the file of a store that will not be finished."""
        os.close(self._descriptor)


def _layout(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, str], TensorLayout]:
    parts = {
        (name, part): layout
        for name, assignment in plan.weights.items()
        for part, layout in assignment.layout(*matrix_shape(shapes[name])).items()
    }
    return dict(sorted(parts.items(), key=lambda item: _ORDER.index(item[1].dtype)))


def _reserve(descriptor: int, nbytes: int) -> None:
    """Reserves the disk space, so that a full disk stops the work before it begins."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:  # macOS has no posix_fallocate: the file gets its size but no space
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
            raise StoreDamagedError("the file of a weight store is shorter than it was")
        view, offset = view[read:], offset + read
