"""ONNX operators on whole numbers, computed with NumPy: positions and lengths of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Final

import numpy as np

from exporters.lifted import Array

Attributes = Mapping[str, Any]


_LARGEST: Final = 1 << 27  # numbers of one range; positions of a call are far fewer


def _range(given: Sequence[Array], attributes: Attributes) -> Array:
    start, end, step = (int(each.ravel()[0]) for each in given)
    if abs(end - start) > _LARGEST:
        raise ValueError(f"it computes {abs(end - start)} numbers for one call")
    return np.arange(start, end, step)


def _axes(given: Sequence[Array]) -> tuple[int, ...] | None:
    return tuple(map(int, given[1].ravel())) if len(given) > 1 else None


def _cast(given: Sequence[Array], attributes: Attributes) -> Array:
    from onnx import helper

    return given[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))


def _unsqueeze(given: Sequence[Array], attributes: Attributes) -> Array:
    return np.expand_dims(given[0], _axes(given) or ())


def _reduce_sum(given: Sequence[Array], attributes: Attributes) -> Array:
    kept = bool(attributes.get("keepdims", 1))
    return np.asarray(given[0].sum(axis=_axes(given), keepdims=kept))


def _reduce_min(given: Sequence[Array], attributes: Attributes) -> Array:
    kept = bool(attributes.get("keepdims", 1))
    return np.asarray(given[0].min(axis=_axes(given), keepdims=kept))


def _concat(given: Sequence[Array], attributes: Attributes) -> Array:
    return np.concatenate(list(given), axis=attributes["axis"])


NUMBERS: Final[Mapping[str, Callable[[Sequence[Array], Attributes], Array]]] = {
    "Add": lambda given, _: np.add(given[0], given[1]),
    "Sub": lambda given, _: np.subtract(given[0], given[1]),
    "Mul": lambda given, _: np.multiply(given[0], given[1]),
    "Max": lambda given, _: reduce(np.maximum, given),
    "Min": lambda given, _: reduce(np.minimum, given),
    "LessOrEqual": lambda given, _: np.less_equal(given[0], given[1]),
    "Less": lambda given, _: np.less(given[0], given[1]),
    "Equal": lambda given, _: np.equal(given[0], given[1]),
    "Where": lambda given, _: np.where(given[0], given[1], given[2]),
    "Cast": _cast,
    "Gather": lambda given, attributes: np.take(given[0], given[1], attributes.get("axis", 0)),
    "Shape": lambda given, _: np.array(given[0].shape, np.int64),
    "Range": _range,
    "Reshape": lambda given, _: given[0].reshape(given[1]),
    "Unsqueeze": _unsqueeze,
    "ReduceSum": _reduce_sum,
    "ReduceMin": _reduce_min,
    "Concat": _concat,
}
"""By operator: what it makes of its operands' arrays and its attributes."""
