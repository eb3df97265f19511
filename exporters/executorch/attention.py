"""Attention, its caches and its windows, as calls of ExecuTorch's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import fx

from exporters.executorch.method import SCALAR_TYPES, ScalarType
from exporters.executorch.state import CacheDtype, MethodLowering, Window
from quant.program.calls import AttentionCall
from quant.program.program import node_argument, shape_of

_HIDDEN: Final = -1e30  # added to the score of a token that is out of the window: exp gives 0


def attention(state: MethodLowering, node: fx.Node) -> None:
    """Writes new keys and values into their caches, then attends to all that are in them."""
    method = state.method
    q, k, v = (state.tensors[node_argument(node, index)] for index in range(3))
    _, _, heads, width = state.outer_dims(node)
    _, kv_heads, context, _ = shape_of(node_argument(node, 3))
    parts_of = _PARTS[state.cache_dtype]
    query = parts_of(state, q, [heads, width])
    call = AttentionCall.of(node)
    window, scale = call.window, call.scale
    start, mask = state.start, method.none()
    if window:
        seen = _window_of(state, window)
        start, mask = seen.position, seen.mask
    kept = []
    for new in (k, v):
        caches = []
        for part in parts_of(state, new, [kv_heads, width]):
            dims = [kv_heads, part.width]
            cache = method.state(part.dtype, [1, context, *dims])
            unused = method.tensor("float32", [1], dynamic=False)
            method.call("llama::update_cache", "out", part.value, cache, state.start, out=unused)
            caches.append(_seen_part(state, seen, part.dtype, cache, dims) if window else cache)
        kept.append(caches)
    (q, *q_grid), (k, *k_grid), (v, *v_grid) = [part.value for part in query], *kept
    out = method.tensor("float32", state.dims(node_argument(node, 0)), dynamic=True)
    state.tensors[node] = out
    arguments = [q, k, v, start, mask, method.double(0.0)]
    arguments += [method.boolean(not window), method.double(scale)]
    if q_grid:
        tokens_second = method.boolean(False)  # dims are [1, tokens, heads, width]
        arguments += [*q_grid, *k_grid, *v_grid, tokens_second]
    kernel = "custom_quantized_sdpa" if q_grid else "custom_sdpa"
    method.call(f"llama::{kernel}", "out", *arguments, out=out)


@dataclass(frozen=True)
class _Part:
    """A tensor that a query, keys or values consist of: ``dtype[1, t, heads, width]``."""

    value: int
    dtype: ScalarType
    width: int


def _floats(state: MethodLowering, value: int, dims: list[int]) -> list[_Part]:
    """The numbers as they are."""
    return [_Part(value, "float32", dims[1])]


def _integers(state: MethodLowering, value: int, dims: list[int]) -> list[_Part]:
    """Integers, zero points and scales, one of each a token and head, in the kernel's order.

    Given: ``x: float32[1, t, heads, width]``
    Result: ``int8[1, t, heads, width]``, ``int8[1, t, heads, 1]``, ``float32[1, t, heads, 1]``
    """
    method, (heads, width) = state.method, dims

    def made(dtype: ScalarType, width: int) -> int:
        return method.tensor(dtype, [1, state.limit, heads, width], dynamic=True)

    int8 = method.integer(SCALAR_TYPES["int8"][0])
    scale, zero_point = made("float64", 1), made("int64", 1)  # no other dtypes are taken
    method.call(
        "quantized_decomposed::choose_qparams_per_token_asymmetric",
        "out",
        value,
        int8,
        scale,
        zero_point,
        method.tensors([scale, zero_point]),
    )
    codes = made("int8", width)
    method.call(
        "quantized_decomposed::quantize_per_token",
        "out",
        value,
        scale,
        zero_point,
        method.integer(-128),
        method.integer(127),
        int8,
        out=codes,
    )
    parts = [_Part(codes, "int8", width)]
    narrowed: tuple[tuple[int, ScalarType], ...] = ((zero_point, "int8"), (scale, "float32"))
    for wide, dtype in narrowed:
        narrow = made(dtype, 1)
        method.call("aten::_to_copy", "out", wide, method.boolean(False), method.none(), out=narrow)
        parts.append(_Part(narrow, dtype, 1))
    return parts


_PARTS: Final[dict[CacheDtype, Callable[[MethodLowering, int, list[int]], list[_Part]]]] = {
    "float32": _floats,
    "int8": _integers,
}


def _window_of(state: MethodLowering, size: int) -> Window:
    """The window of this size, made at the first layer that asks for it."""
    if size not in state.windows:
        state.windows[size] = _make_window(state, size)
    return state.windows[size]


def _make_window(state: MethodLowering, size: int) -> Window:
    method, context, limit = state.method, state.program.context, state.limit
    length = min(context, size - 1 + limit)
    before, first, position = (method.computed_integer() for _ in range(3))
    sub, greater = "executorch_prim::sub", "executorch_prim::sym_max"
    method.call(sub, "Scalar", state.start, method.integer(size - 1), before)
    method.call(greater, "Scalar", before, method.integer(0), first)
    method.call(sub, "Scalar", state.start, first, position)
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
    past, near = made("bool"), made("bool")
    method.call("aten::ge", "Scalar_out", distance, method.integer(0), out=past)
    method.call("aten::lt", "Scalar_out", distance, method.integer(size), out=near)
    seen, mask = made("bool"), made("float32")
    method.call("aten::logical_and", "out", past, near, out=seen)
    shown, hidden = (
        state.table(name, np.array([value], np.float32).tobytes(), [1])
        for name, value in (("shown", 0.0), ("hidden", _HIDDEN))
    )
    method.call("aten::where", "self_out", seen, shown, hidden, out=mask)
    return Window(size, first, position, length, mask)


def _seen_part(
    state: MethodLowering, window: Window, dtype: ScalarType, cache: int, dims: list[int]
) -> int:
    """The tokens of a cache that are seen: attention reads no others when it has a mask."""
    out = state.method.tensor(dtype, [1, window.length, *dims], dynamic=True)
    state.slice(cache, 1, window.first, state.end, out)
    return out
