"""Emits attention and its caches as calls of ExecuTorch's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import fx

from exporters.executorch.capped_attention import capped_attention
from exporters.executorch.method import SCALAR_TYPES, ScalarType
from exporters.executorch.state import CacheDtype, MethodLowering
from exporters.executorch.windows import seen_part, window_of
from quant.program.calls import AttentionCall
from quant.program.program import node_argument, shape_of


def attention(state: MethodLowering, node: fx.Node) -> None:
    """Emits the writes of new keys and values into their caches, and attention over the caches."""
    method, call = state.method, AttentionCall.of(node)
    if call.softcap:
        capped_attention(state, node)
        return
    q, k, v = (state.tensors[node_argument(node, index)] for index in range(3))
    _, _, heads, width = state.outer_dims(node)
    _, kv_heads, context, _ = shape_of(node_argument(node, 3))
    parts_of = _PARTS[state.cache_dtype]
    query = parts_of(state, q, [heads, width])
    window, scale = call.window, call.scale
    start, mask = state.start, method.none()
    if window:
        seen = window_of(state, window)
        start, mask = seen.position, seen.mask
    kept = []
    for new in (k, v):
        caches = []
        for part in parts_of(state, new, [kv_heads, width]):
            dims = [kv_heads, part.width]
            cache = method.state(part.dtype, [1, context, *dims])
            unused = method.tensor("float32", [1], dynamic=False)
            method.call("llama::update_cache", "out", part.value, cache, state.start, out=unused)
            caches.append(seen_part(state, seen, part.dtype, cache, dims) if window else cache)
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
    """One tensor of those that queries, keys or values consist of: ``dtype[1, t, heads, width]``.

    Attributes:
        value: the number of the method's value.
        dtype: the element type.
        width: the last dimension.
    """

    value: int
    dtype: ScalarType
    width: int


def _floats(state: MethodLowering, value: int, dims: list[int]) -> list[_Part]:
    """Queries, keys or values as one float32 tensor."""
    return [_Part(value, "float32", dims[1])]


def _integers(state: MethodLowering, value: int, dims: list[int]) -> list[_Part]:
    """Emits the rounding to int8, with one zero point and one scale for each token and head.

    The parts come in the order in which the attention kernel takes them.

    Given: ``x: float32[1, t, heads, width]``
    Result: ``int8[1, t, heads, width]``, ``int8[1, t, heads, 1]``, ``float32[1, t, heads, 1]``
    """
    method, (heads, width) = state.method, dims

    def made(dtype: ScalarType, width: int) -> int:
        return method.tensor(dtype, [1, state.limit, heads, width], dynamic=True)

    int8 = method.integer(SCALAR_TYPES["int8"][0])
    scale, zero_point = made("float64", 1), made("int64", 1)  # the kernel takes no other dtypes
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
