"""Weight stores with a fault in them: copies of a store with other bytes in a part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from quant.formats.formats import IntFormat
from quant.store.store import WeightStore


def altered(
    store: WeightStore,
    apart: Path,
    weights: Iterable[str],
    part: str,
    change: Callable[[np.ndarray], np.ndarray],
) -> WeightStore:
    """Copies a store and changes the bytes of one part of some weights.

    Args:
        store: the store.
        apart: the folder of the copy.
        weights: the weights' names.
        part: ``codes`` or ``scale``.
        change: takes and returns the part's bytes, ``uint8[rows, bytes of a row]``.
    """
    folder = apart / "store"
    shutil.copytree(store.folder, folder)
    copy = WeightStore(folder)
    with copy.file.open("r+b") as stream:
        for name in weights:
            extent = copy.extents(name)[part]
            stream.seek(extent.offset)
            rows = np.frombuffer(stream.read(extent.nbytes), np.uint8)
            changed = change(rows.reshape(extent.shape[0], -1).copy())
            assert changed.size == rows.size
            stream.seek(extent.offset)
            stream.write(np.ascontiguousarray(changed).tobytes())
    return WeightStore(folder)


def in_four_bits(store: WeightStore) -> list[str]:
    """The weights that have codes of 4 bits."""
    return [
        name
        for name, given in store.plan.weights.items()
        if isinstance(given.format, IntFormat) and given.format.bits == 4
    ]


def in_groups(store: WeightStore) -> list[str]:
    """The weights with several scales a row."""
    return [
        name
        for name, given in store.plan.weights.items()
        if isinstance(given.format, IntFormat) and store.extents(name)["scale"].shape[1] > 1
    ]


def with_nibbles(share: float | None) -> Callable[[np.ndarray], np.ndarray]:
    """Flips the highest bit of some codes: of this share of all, or of a single one."""

    def change(rows: np.ndarray) -> np.ndarray:
        flat = rows.reshape(-1)
        count = 1 if share is None else max(1, round(2 * flat.size * share))
        chosen = np.random.default_rng(0).choice(2 * flat.size, count, replace=False)
        np.bitwise_xor.at(flat, chosen // 2, np.where(chosen % 2, 0x80, 0x08).astype(np.uint8))
        return rows

    return change


def transposed(rows: np.ndarray) -> np.ndarray:
    """The two-byte scales of ``[rows, groups]``, stored in the order of ``[groups, rows]``."""
    return np.ascontiguousarray(rows.view(np.uint16).T).view(np.uint8)
