"""How far keys and values reach on a text, for caches whose scales are fixed when they are written.

The quantized program runs over the calibration text, call by call, up to the last attention; of
every cache the largest magnitude of each column is kept. A rotation moves length between the two
columns of a pair, and how far depends on the position: so both columns of a pair reach as far as
its longest vector, which no position past those of the text exceeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from edgeforge.reference.segments import MEMORY_BOUND, Stretches, tokens_of
from edgeforge.reference.walk import Values, Walk, WeightReader, store_reader
from quant.errors import QuantizationError
from quant.program import dialect
from quant.program.program import Program, node_argument, shape_of
from quant.store.store import WeightStore

if TYPE_CHECKING:
    from exporters.target import CacheRanges

RANGES_VERSION: Final = 1
# Tokens of the text that are looked at: more move the largest magnitudes by little.
RANGE_TOKENS: Final = 8192


def cache_ranges(
    program: Program,
    store: WeightStore,
    blocks: Sequence[Sequence[int]],
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> CacheRanges:
    """How far every cache reaches: found in the cache folder, or measured now.

    Args:
        program: in the quantized dialect.
        store: the weights it names.
        blocks: the text, each block a fresh one; what is past `RANGE_TOKENS` is not looked at.
        cache: folder of what was measured before.
        progress: told how many layers are done, and of how many.

    Raises:
        QuantizationError: keys or values are not finite; the layer is named.
    """
    count = max(1, RANGE_TOKENS // len(blocks[0]))
    seen = blocks[:count]
    file = cache / f"{_key(program, store, seen)}.npz"
    found = _read(file, program)
    if found is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    ranges = _measure(program, store_reader(store), seen, cache, progress)
    partial = cache / f".{file.stem}.partial-{os.getpid()}.npz"
    arrays: dict[str, Any] = dict(ranges)
    np.savez(partial, **arrays)
    partial.replace(file)
    return ranges


def reach(columns: Tensor, rotary_width: int) -> Tensor:
    """The largest magnitude of each column, at whatever angle its pair is turned.

    Args:
        columns: ``float32[1, t, heads, head_dim]``.
        rotary_width: how many columns are rotated, the first with the one half of them further.

    Returns:
        ``float32[heads, head_dim]``.

    >>> reach(torch.tensor([[[[3.0, 1.0, 4.0, -2.0, -9.0]]]]), 4)
    tensor([[5.0000, 2.2361, 5.0000, 2.2361, 9.0000]])
    """
    half = rotary_width // 2
    pairs = torch.hypot(columns[..., :half], columns[..., half:rotary_width])
    whole = torch.cat((pairs, pairs, columns[..., rotary_width:].abs()), -1)
    return whole.amax((0, 1))


class _WatchedWalk(Walk):
    """A walk that keeps how far the keys and values reach that enter each attention.

    Attributes:
        ranges: by cache, ``float32[kv_heads, head_dim]``.
    """

    def __init__(self, program: Program, read: WeightReader) -> None:
        super().__init__(program, read)
        self.ranges: dict[str, Tensor] = {}
        self._lock = Lock()

    def prepare(self, node: fx.Node) -> Callable[[Values], Any]:
        run = super().prepare(node)
        if node.target is not dialect.ATTENTION:
            return run

        def watched(values: Values) -> Any:
            for index in (1, 2):
                self._watch(node, index, values[node_argument(node, index)])
            return run(values)

        return watched

    def _watch(self, node: fx.Node, index: int, columns: Tensor) -> None:
        """Widens the range of a cache, argument ``index + 2``, by what argument ``index`` is."""
        source = node_argument(node, index)
        width = 2 * shape_of(node_argument(source, 1))[1] if source.target is dialect.ROPE else 0
        found = reach(columns, width)
        name = self.program.inputs[node_argument(node, index + 2).name].name
        with self._lock:
            known = self.ranges.get(name)
            # `maximum` keeps a NaN.
            self.ranges[name] = found if known is None else torch.maximum(known, found)


def _measure(
    program: Program,
    read: WeightReader,
    blocks: Sequence[Sequence[int]],
    scratch: Path,
    progress: Callable[[int, int], None],
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    walk = _WatchedWalk(program, read)
    wanted = 2 * sum(node.target is dialect.ATTENTION for node in walk.order)
    known = [walk.begin(tokens_of(block)) for block in blocks]
    progress(0, wanted // 2)
    with (
        tempfile.TemporaryDirectory(dir=scratch) as folder,
        Stretches(walk, known, Path(folder) / "spilled", MEMORY_BOUND) as stretches,
    ):
        measured = 0
        for _ in stretches.matrices():
            if len(walk.ranges) > measured:
                measured = len(walk.ranges)
                _require_finite(walk.ranges)
                progress(measured // 2, wanted // 2)
            if measured == wanted:  # the last attention has run; nothing after it is needed
                break
    return {name: found.numpy() for name, found in walk.ranges.items()}


def _require_finite(ranges: Mapping[str, Tensor]) -> None:
    for name, found in ranges.items():
        if not bool(torch.isfinite(found).all()):
            kind = "keys" if name.endswith("k_cache") else "values"
            raise QuantizationError(
                f"{kind} of {name.rpartition('.')[0]} are NaN or infinite on the calibration text, "
                f"so that int8 caches have no scale: the checkpoint overflows there, or is damaged"
            )


def _key(program: Program, store: WeightStore, blocks: Sequence[Sequence[int]]) -> str:
    """Names what ranges follow from: the program, its tables and weights, and the text."""
    found = hashlib.sha256(str(program.graph).encode())
    for name, table in sorted(program.tables.items()):
        found.update(name.encode() + table.numpy().tobytes())
    facts = {
        "version": RANGES_VERSION,
        "inputs": {name: given.name for name, given in program.inputs.items()},
        "weights": dict(store.digests),
        "blocks": [list(block) for block in blocks],
    }
    found.update(json.dumps(facts, sort_keys=True).encode())
    return found.hexdigest()[:40]


def _read(file: Path, program: Program) -> CacheRanges | None:
    """What was measured before, where it is whole."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    wanted = {given.name for _, given in program.placeholders("cache")}
    whole = found.keys() == wanted and all(a.dtype == np.float32 for a in found.values())
    return found if whole else None
