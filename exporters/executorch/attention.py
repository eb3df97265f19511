"""Emits attention and its caches as calls of ExecuTorch's kernels."""

from __future__ import annotations

from torch import fx

from exporters.executorch.cache_parts import PARTS
from exporters.executorch.capped_attention import capped_attention
from exporters.executorch.state import MethodLowering
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
    parts_of = PARTS[state.cache_dtype]
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
