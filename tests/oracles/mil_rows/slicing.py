"""Arguments and results of slices, gathers and scatters."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.oracles.mil_rows.draw import Arguments, Draw


def make_slice(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3, 6))
    begin, end, stride, squeeze = [], [], [], []
    for size in x.shape:
        step = d.pick(1, 1, 2, -1, -2)
        first, last = sorted((d.int(0, size - 1), d.int(0, size - 1)))
        begin.append(first if step > 0 else last)
        end.append(last + 1 if step > 0 else first)
        stride.append(step)
        squeeze.append(d.pick(False, False, True) and x.ndim > 1 and not all(squeeze[1:]))
    if all(squeeze):
        squeeze[0] = False
    masks = [d.flag() and not single for single in squeeze]
    ends = [d.flag() for _ in squeeze]
    # A slice backwards down to the first element needs its end ignored.
    ends = [end or (step < 0) for end, step in zip(ends, stride, strict=True)]
    return {
        "x": x,
        "begin": np.array(begin, np.int32),
        "end": np.array(end, np.int32),
        "stride": np.array(stride, np.int32),
        "begin_mask": np.array(masks),
        "end_mask": np.array(ends),
        "squeeze_mask": np.array(squeeze),
    }


def slices_of(given: Arguments) -> tuple[Any, ...]:
    found: list[Any] = []
    for axis in range(given["x"].ndim):
        if given["squeeze_mask"][axis]:
            found.append(int(given["begin"][axis]))
            continue
        first = None if given["begin_mask"][axis] else int(given["begin"][axis])
        last = None if given["end_mask"][axis] else int(given["end"][axis])
        found.append(slice(first, last, int(given["stride"][axis])))
    return tuple(found)


def sliced(**given: Any) -> np.ndarray[Any, Any]:
    return np.asarray(given["x"][slices_of(given)])


def make_update(d: Draw) -> Arguments:
    given = make_slice(d)
    return {**given, "update": d.floats(np.asarray(given["x"][slices_of(given)]).shape)}


def updated(update: np.ndarray[Any, Any], **given: Any) -> np.ndarray[Any, Any]:
    whole = given["x"].copy()
    whole[slices_of(given)] = update
    return whole


def make_gather(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3))
    axis = d.axis(x.ndim)
    indices = d.ints(d.shape(1, 2), 0, x.shape[axis])
    return {"x": x, "indices": indices, "axis": np.int32(axis), "batch_dims": np.int32(0)}


def make_along(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3))
    axis = d.axis(x.ndim)
    shape = list(x.shape)
    shape[axis] = d.int(1, 5)
    indices = d.ints(tuple(shape), 0, x.shape[axis])
    return {"x": x, "indices": indices, "axis": np.int32(axis)}


def make_scatter_along(d: Draw) -> Arguments:
    given = make_along(d)
    given["data"] = given.pop("x")
    given["updates"] = d.floats(given["indices"].shape, 0.5, 2)
    return {**given, "mode": d.pick("add", "sub", "mul", "div", "max", "min")}


SCATTER = {
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": np.divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def scattered_along(data: Any, indices: Any, updates: Any, axis: Any, mode: str) -> Any:
    whole, places = data.copy(), list(np.indices(indices.shape))
    places[axis] = indices
    SCATTER[mode](whole, tuple(places), updates)
    return whole


def make_scatter(d: Draw) -> Arguments:
    data = d.floats(d.shape(1, 3))
    axis = d.axis(data.ndim)
    shape = list(data.shape)
    shape[axis] = d.int(1, 4)
    return {
        "data": data,
        "indices": d.ints((shape[axis],), 0, data.shape[axis]),
        "updates": d.floats(tuple(shape), 0.5, 2),
        "axis": np.int32(axis),
        "mode": d.pick(*SCATTER),
    }


def scattered(data: Any, indices: Any, updates: Any, axis: Any, mode: str) -> Any:
    whole = np.moveaxis(data.copy(), axis, 0)
    SCATTER[mode](whole, indices, np.moveaxis(updates, axis, 0))
    return np.moveaxis(whole, 0, axis)


def make_scatter_nd(d: Draw) -> Arguments:
    data = d.floats(d.shape(1, 3))
    depth, count = d.int(1, data.ndim), d.int(1, 4)
    indices = np.stack([d.ints((count,), 0, size) for size in data.shape[:depth]], -1)
    updates = d.floats((count, *data.shape[depth:]), 0.5, 2)
    return {"data": data, "indices": indices, "updates": updates, "mode": d.pick(*SCATTER)}


def scattered_nd(data: Any, indices: Any, updates: Any, mode: str) -> Any:
    whole = data.copy()
    SCATTER[mode](whole, tuple(np.moveaxis(indices, -1, 0)), updates)
    return whole


def make_gather_nd(d: Draw) -> Arguments:
    x = d.floats(d.shape(2, 3))
    depth = d.int(1, x.ndim)
    indices = np.stack([d.ints((3,), 0, size) for size in x.shape[:depth]], -1)
    return {"x": x, "indices": indices}
