"""Arguments of operations on single elements and of reductions."""

from __future__ import annotations

import numpy as np

from tests.oracles.mil_rows.draw import Arguments, Draw, Row


def unary(low: float = -3, high: float = 3) -> Row:
    return Row(lambda d: {"x": d.floats(d.shape(), low, high)})


def binary(low: float = -3, high: float = 3) -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        return {"x": d.floats(one, low, high), "y": d.floats(other, low, high)}

    return Row(make)


def whole_binary(low: int, high: int) -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        if d.flag():
            return {"x": d.ints(one, low, high), "y": d.ints(other, low, high)}
        return {"x": d.floats(one, low, high), "y": d.floats(other, low, high)}

    return Row(make)


def comparison() -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        return {"x": d.ints(one, 0, 3), "y": d.ints(other, 0, 3)}

    return Row(make)


def logical() -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        return {"x": d.bools(one), "y": d.bools(other)}

    return Row(make)


def activation(**factors: tuple[float, float]) -> Row:
    def make(d: Draw) -> Arguments:
        numbers = {name: np.float32(d.floats((), *ends)) for name, ends in factors.items()}
        return {"x": d.floats(d.shape()), **numbers}

    return Row(make)


def of_channels(*names: str) -> Row:
    def make(d: Draw) -> Arguments:
        shape = d.shape(4, 4)
        return {"x": d.floats(shape), **{name: d.floats((shape[1],), 0.1, 2) for name in names}}

    return Row(make)


def reduction(low: float = -3, high: float = 3) -> Row:
    def make(d: Draw) -> Arguments:
        x = d.floats(d.shape(), low, high)
        chosen = {} if d.flag() else {"axes": np.array(d.axes(x.ndim), np.int32)}
        return {"x": x, **chosen, "keep_dims": d.flag()}

    return Row(make)


def whole_reduction() -> Row:
    def make(d: Draw) -> Arguments:
        shape = d.shape(largest=3)
        x = d.ints(shape) if d.flag() else d.floats(shape)
        return {"x": x, "axes": np.array(d.axes(x.ndim), np.int32), "keep_dims": d.flag()}

    return Row(make)


def argument_reduction() -> Row:
    def make(d: Draw) -> Arguments:
        x = d.floats(d.shape())
        return {"x": x, "axis": np.int32(d.axis(x.ndim)), "keep_dims": d.flag()}

    return Row(make)
