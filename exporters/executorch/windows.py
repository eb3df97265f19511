"""Emits the masks by which attention hides tokens, as calls of ExecuTorch's kernels."""

from __future__ import annotations

from typing import Final

import numpy as np

from exporters.executorch.method import ScalarType
from exporters.executorch.state import MethodLowering, Window

_HIDDEN: Final = -1e30  # added to the score of a token outside the window, so that exp gives 0


def window_of(state: MethodLowering, size: int) -> Window:
    """Returns the window of this size; the first layer that asks for it emits its tensors.

    Args:
        state: the method.
        size: how many tokens a token sees, itself included; 0 for all tokens before it.
    """
    if size not in state.windows:
        state.windows[size] = _make_window(state, size)
    return state.windows[size]


def _make_window(state: MethodLowering, size: int) -> Window:
    method, context, limit = state.method, state.program.context, state.limit
    if size:
        length = min(context, size - 1 + limit)
        before, first, position = (method.computed_integer() for _ in range(3))
        sub, greater = "executorch_prim::sub", "executorch_prim::sym_max"
        method.call(sub, "Scalar", state.start, method.integer(size - 1), before)
        method.call(greater, "Scalar", before, method.integer(0), first)
        method.call(sub, "Scalar", state.start, first, position)
    else:
        length, first, position = context, method.integer(0), state.start
    numbers = np.arange(context, dtype=np.float32).tobytes()
    rows = method.tensor("float32", [limit, 1], dynamic=True)
    table = state.table("numbers", numbers, [context, 1])
    state.slice(table, 0, state.start, state.end, rows)
    columns = method.tensor("float32", [1, length], dynamic=True)
    state.slice(state.table("numbers", numbers, [1, context]), 1, first, state.end, columns)

    def made(dtype: ScalarType) -> int:
        return method.tensor(dtype, [limit, length], dynamic=True)

    distance = made("float32")
    method.call("aten::sub", "out", rows, columns, method.integer(1), out=distance)
    seen = made("bool")
    method.call("aten::ge", "Scalar_out", distance, method.integer(0), out=seen)
    if size:
        past, near, seen = seen, made("bool"), made("bool")
        method.call("aten::lt", "Scalar_out", distance, method.integer(size), out=near)
        method.call("aten::logical_and", "out", past, near, out=seen)
    mask = made("float32")
    shown, hidden = (
        state.table(name, np.array([value], np.float32).tobytes(), [1])
        for name, value in (("shown", 0.0), ("hidden", _HIDDEN))
    )
    method.call("aten::where", "self_out", seen, shown, hidden, out=mask)
    return Window(size, first, position, length, mask)


def seen_part(
    state: MethodLowering, window: Window, dtype: ScalarType, cache: int, dims: list[int]
) -> int:
    """Emits a copy of a cache's tokens within a window; attention with a mask reads only these."""
    out = state.method.tensor(dtype, [1, window.length, *dims], dynamic=True)
    state.slice(cache, 1, window.first, state.end, out)
    return out
