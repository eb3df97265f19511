"""Measures the largest magnitudes of keys and values on a text, for caches with fixed scales.

The quantized program runs over the calibration text, call by call, up to the last attention, and
keeps the largest magnitude of each column of every cache. The rotary embedding turns each pair of
columns by an angle that depends on the position. It keeps the pair's length, so the longest vector
of a pair on the text bounds both of its columns at every position, also past those of the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from edgeforge.cache import read_record, write_record
from edgeforge.reference.segments import MEMORY_BOUND, Stretches, tokens_of
from edgeforge.reference.walk import Values, Walk, WeightReader, store_reader
from quant.errors import QuantizationError
from quant.locked_folders import unfinished
from quant.program import dialect
from quant.program.program import Program, node_argument, shape_of
from quant.store.store import WeightStore

if TYPE_CHECKING:
    from exporters.target import CacheRanges

RANGES_VERSION: Final = 2
# Tokens of the text that are used: more tokens change the largest magnitudes only a little.
RANGE_TOKENS: Final = 8192


def cache_ranges(
    program: Program,
    store: WeightStore,
    blocks: Sequence[Sequence[int]],
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> CacheRanges:
    """Returns the ranges of every key/value cache, from the cache folder or measured now.

    Args:
        program: a program in the quantized dialect.
        store: the weights that the program names.
        blocks: the text; each block is a text of its own. Blocks past `RANGE_TOKENS` tokens are
            not used.
        cache: folder of ranges that were measured before.
        progress: called with the number of layers done and the number of all layers.

    Returns:
        ``float32[kv_heads, head_dim]`` by cache.

    Raises:
        QuantizationError: keys or values are not finite; the message names the layer.
    """
    count = max(1, RANGE_TOKENS // len(blocks[0]))
    seen = blocks[:count]
    key = measurement_key(program, store, seen, {"version": RANGES_VERSION})
    file = cache / f"{key}.json"
    found = _read(file, program)
    if found is not None:
        return found
    with unfinished(cache, file.stem) as scratch:
        ranges = _measure(program, store_reader(store), seen, scratch, progress)
    write_record(file, {name: found.tolist() for name, found in ranges.items()})
    return ranges


def reach(columns: Tensor, rotary_width: int) -> Tensor:
    """Returns the largest magnitude that each column can have when its pair is turned by any angle.

    Args:
        columns: ``float32[1, t, heads, head_dim]``.
        rotary_width: number of rotated columns; column ``i`` makes a pair with column
            ``i + rotary_width // 2``.

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
    """A walk that records the largest magnitudes of the keys and values of each attention.

    Attributes:
        ranges: ``float32[kv_heads, head_dim]`` by cache.
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
        """Widens the range of the cache (argument ``index + 2``) by argument ``index``'s values."""
        source = node_argument(node, index)
        width = 2 * shape_of(node_argument(source, 1))[1] if source.target is dialect.ROPE else 0
        found = reach(columns, width)
        name = self.program.inputs[node_argument(node, index + 2).name].name
        with self._lock:
            known = self.ranges.get(name)
            # `torch.maximum` passes a NaN on, so that `_require_finite` sees it.
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
    with Stretches(walk, known, scratch / "spilled", MEMORY_BOUND) as stretches:
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
                f"so int8 caches have no scale: the checkpoint overflows there, or is damaged"
            )


def measurement_key(
    program: Program,
    store: WeightStore,
    blocks: Sequence[Sequence[int]],
    more: Mapping[str, object],
) -> str:
    """Returns a key for all that decides what is measured of a quantized program on a text.

    Args:
        program: the program, with its tables.
        store: the weights that it names.
        blocks: the text.
        more: what else decides, as JSON values: the measurement's version at least.
    """
    found = hashlib.sha256(str(program.graph).encode())
    for name, table in sorted(program.tables.items()):
        found.update(name.encode() + table.numpy().tobytes())
    facts = {
        **more,
        "inputs": {name: given.name for name, given in program.inputs.items()},
        "weights": dict(store.digests),
        "blocks": [list(block) for block in blocks],
    }
    found.update(json.dumps(facts, sort_keys=True).encode())
    return found.hexdigest()[:40]


def _read(file: Path, program: Program) -> CacheRanges | None:
    """Returns ranges that were measured before, or None where the file is missing or damaged."""
    record = read_record(file)
    wanted = {given.name for _, given in program.placeholders("cache")}
    if record is None or record.keys() != wanted:
        return None
    return {name: np.array(rows, np.float32) for name, rows in record.items()}
