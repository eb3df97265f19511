"""MIL operations on whole numbers and masks, computed with NumPy: positions, bounds, visibility."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from exporters.lifted import Array

Given = Mapping[str, Array]
_LARGEST: Final = 1 << 27  # elements; a mask of a call over a whole context has far fewer


def _range(given: Given) -> Array:
    start, end, step = (int(given[name].ravel()[0]) for name in ("start", "end", "step"))
    return _bounded(np.arange(start, min(end, start + _LARGEST), step))


def _bounded(array: Array) -> Array:
    if array.size > _LARGEST:
        raise ValueError(f"it computes {array.size} numbers for one call")
    return array


def _reshape(given: Given) -> Array:
    return given["x"].reshape(tuple(map(int, given["shape"])))


def _tile(given: Given) -> Array:
    reps = tuple(map(int, given["reps"]))
    if given["x"].size * np.prod(reps, dtype=np.float64) > _LARGEST:
        raise ValueError("it repeats a mask too often")
    return np.tile(given["x"], reps)


def _reduce_sum(given: Given) -> Array:
    axes = tuple(map(int, given["axes"].ravel()))
    return np.asarray(given["x"].sum(axes, keepdims=bool(given["keep_dims"])))


def _gather(given: Given) -> Array:
    return np.take(given["x"], given["indices"], int(given["axis"].ravel()[0]))


NUMBERS: Final[Mapping[str, Callable[[Given], Array]]] = {
    "add": lambda given: _bounded(np.add(given["x"], given["y"])),
    "sub": lambda given: _bounded(np.subtract(given["x"], given["y"])),
    "mul": lambda given: _bounded(np.multiply(given["x"], given["y"])),
    "less_equal": lambda given: _bounded(np.less_equal(given["x"], given["y"])),
    "greater": lambda given: _bounded(np.greater(given["x"], given["y"])),
    "equal": lambda given: _bounded(np.equal(given["x"], given["y"])),
    "logical_and": lambda given: np.logical_and(given["x"], given["y"]),
    # Types need no rounding here: all numbers are whole, or a mask's two.
    "cast": lambda given: (
        given["x"].astype(np.float64) if given["x"].dtype == np.bool_ else given["x"]
    ),
    "reshape": _reshape,
    "tile": _tile,
    "reduce_sum": _reduce_sum,
    "range_1d": _range,
    "gather": _gather,
}
"""By operation: what it makes of its operands' arrays, which have the names of its parameters."""
