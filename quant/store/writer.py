"""Writes a weight store: every part has its place before any weight is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from quant.errors import QuantizationError
from quant.formats.formats import TensorLayout
from quant.plans.plan import QuantPlan, matrix_shape
from quant.store.store import NOTES_FILE, STORE_VERSION, WEIGHTS_FILE, weight_digest

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
# Wide elements first, so that every part is aligned to its own element without holes.
_ORDER = ("float32", "float16", "bfloat16", "uint8")


@dataclass(frozen=True)
class WeightNote:
    """How well one weight survived: relative L2 error of what is stored, 0 when it is exact."""

    relative_error: float


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
        self._descriptor = os.open(folder / WEIGHTS_FILE, os.O_RDWR | new, 0o644)
        if reopen:
            found = os.fstat(self._descriptor).st_size
            if found != self.nbytes:
                os.close(self._descriptor)
                raise QuantizationError(
                    f"{folder / WEIGHTS_FILE} has {found} bytes and not {self.nbytes}: remove the "
                    f"folder"
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
        (self.folder / NOTES_FILE).write_text(json.dumps(notes, indent=1), encoding="utf-8")

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


def _layout(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, str], TensorLayout]:
    parts = {
        (name, part): layout
        for name, assignment in plan.weights.items()
        for part, layout in assignment.layout(*matrix_shape(shapes[name])).items()
    }
    return dict(sorted(parts.items(), key=lambda item: _ORDER.index(item[1].dtype)))


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
