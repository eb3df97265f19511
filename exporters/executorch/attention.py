"""Attention, its caches and its windows, as calls of ExecuTorch's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from torch import fx

from exporters.executorch.method import ScalarType
from quant.program import node_argument, shape_of

if TYPE_CHECKING:
    from exporters.executorch.lowering import MethodLowering

_HIDDEN: Final = -1e30  # added to the score of a token that is out of the window: exp gives 0


def attention(state: MethodLowering, node: fx.Node) -> None:
    """Writes new keys and values into their caches, then attends to all that are in them."""
    method = state.method
    q, k, v = (state.tensors[node_argument(node, index)] for index in range(3))
    _, kv_heads, context, width = shape_of(node_argument(node, 3))
    caches = [method.state("float32", [1, context, kv_heads, width]) for _ in range(2)]
    for cache, new in zip(caches, (k, v), strict=True):
        unused = method.tensor("float32", [1], dynamic=False)
        method.call("llama::update_cache", "out", new, cache, state.start, out=unused)
    window, scale = node.args[6], node.args[7]
    assert isinstance(window, int) and isinstance(scale, float)
    start, mask = state.start, method.none()
    if window:
        seen = Window.of(state, window)
        start, mask = seen.position, seen.mask
        caches = [seen.cut(state, cache, [kv_heads, width]) for cache in caches]
    out = method.tensor("float32", state.dims(node_argument(node, 0)), dynamic=True)
    state.tensors[node] = out
    method.call(
        "llama::custom_sdpa",
        "out",
        *(q, *caches, start, mask, method.double(0.0)),
        *(method.boolean(not window), method.double(scale)),
        out=out,
    )


@dataclass(frozen=True)
class Window:
    """What attention within a window needs, the same for every layer.

    Attributes:
        size: of the window.
        first: number of the first token that any of the new ones sees.
        position: of the first new token, counted from there.
        length: of what is seen, at most.
        mask: ``float32[t, seen]``: 0 where ``i - size < j <= i``, else so low that exp gives 0.
    """

    size: int
    first: int
    position: int
    length: int
    mask: int

    @classmethod
    def of(cls, state: MethodLowering, size: int) -> Window:
        """The window of this size, made at the first layer that asks for it."""
        if size not in state.windows:
            state.windows[size] = cls._make(state, size)
        return state.windows[size]

    @classmethod
    def _make(cls, state: MethodLowering, size: int) -> Window:
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
        return cls(size, first, position, length, mask)

    def cut(self, state: MethodLowering, cache: int, dims: list[int]) -> int:
        """The tokens of a cache that are seen: attention reads no others when it has a mask."""
        out = state.method.tensor("float32", [1, self.length, *dims], dynamic=True)
        state.slice(cache, 1, self.first, state.end, out)
        return out
