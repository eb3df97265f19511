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
    """The rows of a mask, once for all query heads of a key head: a copy would tell nothing new.

    Raises:
        ValueError: another dimension is repeated.
    """
    reps = tuple(map(int, given["reps"]))
    if len(reps) != given["x"].ndim or any(each != 1 for each in (*reps[:-2], *reps[-1:])):
        raise ValueError("it repeats other dimensions of a mask than its rows")
    return given["x"]


def _cast(given: Given) -> Array:
    """A mask as zeros and ones in Core ML's own dtype; whole numbers as they are."""
    return given["x"].astype(np.float16) if given["x"].dtype == np.bool_ else given["x"]


def _mul(given: Given) -> Array:
    with np.errstate(over="ignore"):  # a hidden token's score is to become minus infinity
        return _bounded(np.multiply(given["x"], given["y"]))


def _reduce_sum(given: Given) -> Array:
    axes = tuple(map(int, given["axes"].ravel()))
    return np.asarray(given["x"].sum(axes, keepdims=bool(given["keep_dims"])))


def _gather(given: Given) -> Array:
    return np.take(given["x"], given["indices"], int(given["axis"].ravel()[0]))


NUMBERS: Final[Mapping[str, Callable[[Given], Array]]] = {
    "add": lambda given: _bounded(np.add(given["x"], given["y"])),
    "sub": lambda given: _bounded(np.subtract(given["x"], given["y"])),
    "mul": _mul,
    "maximum": lambda given: _bounded(np.maximum(given["x"], given["y"])),
    "floor_div": lambda given: _bounded(np.floor_divide(given["x"], given["y"])),
    "greater_equal": lambda given: _bounded(np.greater_equal(given["x"], given["y"])),
    "logical_not": lambda given: np.logical_not(given["x"]),
    "less_equal": lambda given: _bounded(np.less_equal(given["x"], given["y"])),
    "greater": lambda given: _bounded(np.greater(given["x"], given["y"])),
    "equal": lambda given: _bounded(np.equal(given["x"], given["y"])),
    "logical_and": lambda given: np.logical_and(given["x"], given["y"]),
    "cast": _cast,
    "reshape": _reshape,
    "tile": _tile,
    "reduce_sum": _reduce_sum,
    "range_1d": _range,
    "gather": _gather,
}
"""By operation: what it makes of its operands' arrays, which have the names of its parameters."""
