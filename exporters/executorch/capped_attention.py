"""Emits attention whose scores are bounded by a tanh, which no kernel of ExecuTorch computes.

Kernels write the caches and copy what the new tokens see of them, as for other attention. Scores,
softmax and the mixing of values are a part of the delegate that follows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import fx

from exporters.executorch.cache_parts import PARTS, floats_of
from exporters.executorch.pointwise import scaled
from exporters.executorch.state import LAST_INDEX, MethodLowering, Scored
from exporters.executorch.windows import seen_part, window_of
from quant.program.calls import AttentionCall
from quant.program.program import node_argument, shape_of


def capped_attention(state: MethodLowering, node: fx.Node) -> None:
    """Emits the writes of new keys and values and copies of what is seen of the caches.

    The rest waits for the delegate that reads the node (`MethodLowering.deferred`).
    """
    call, method = AttentionCall.of(node), state.method
    q, k, v = (state.tensors[node_argument(node, index)] for index in range(3))
    _, kv_heads, context, width = shape_of(call.key_cache)
    window = window_of(state, call.window)
    seen, dims = [], [kv_heads, width]
    for new in (k, v):
        copies = []
        for part in PARTS[state.cache_dtype](state, new, dims):
            cache = method.state(part.dtype, [1, context, kv_heads, part.width])
            unused = method.tensor("float32", [1], dynamic=False)
            method.call("llama::update_cache", "out", part.value, cache, state.start, out=unused)
            copies.append(seen_part(state, window, part.dtype, cache, [kv_heads, part.width]))
        seen.append(floats_of(state, copies, dims, window.length))
    scored = Scored(call, q, seen[0], seen[1], window, window.mask, state.limit)
    state.scored[node] = scored
    state.deferred[node] = partial(_mixed_all, state, scored)


def last_of(state: MethodLowering, node: fx.Node, source: fx.Node) -> None:
    """Emits the selection of the last tokens' queries and of their rows of the mask."""
    method, whole = state.method, state.scored[source]
    tokens = min(state.limit, node.meta["positions"])
    ends = method.integer(-node.meta["positions"]), method.integer(LAST_INDEX)
    heads, width = shape_of(whole.call.q)[2:]
    queries = method.tensor("float32", [1, tokens, heads, width], dynamic=tokens > 1)
    state.slice(whole.queries, 1, *ends, queries)
    rows = method.tensor("float32", [tokens, whole.window.length], dynamic=True)
    state.slice(whole.window.mask, 0, *ends, rows)
    mask = _for_groups(state, rows, whole, tokens)
    scored = replace(whole, queries=queries, mask=mask, tokens=tokens)
    state.deferred[node] = partial(_mixed, state, scored)


def _for_groups(state: MethodLowering, rows: int, scored: Scored, tokens: int) -> int:
    """The mask for the query heads that share a key head, one after the other.

    One token's mask is the same for all heads.

    Given: ``float32[t, seen]``
    Result: ``float32[groups * t, seen]``
    """
    method, groups = state.method, scored.groups
    if groups == 1 or tokens == 1:
        return rows
    key = rows, groups
    if key not in state.repeated_masks:
        dims = [groups * tokens, scored.window.length]
        mask = state.repeated_masks[key] = method.tensor("float32", dims, dynamic=True)
        parts = method.tensors([rows] * groups)
        method.call("aten::cat", "out", parts, method.integer(0), out=mask)
    return state.repeated_masks[key]


def _mixed_all(state: MethodLowering, scored: Scored) -> int:
    """Emits `_mixed` for all of the new tokens."""
    mask = _for_groups(state, scored.mask, scored, scored.tokens)
    return _mixed(state, replace(scored, mask=mask))


def _mixed(state: MethodLowering, scored: Scored) -> int:
    """Emits the scores, their bound and softmax, and the mixing of values.

    Query heads that share a key head form one matrix, so that no key is copied for each of them.

    Given: ``q: float32[1, t, h, d]``, ``k, v: float32[1, seen, kv, d]``
    Result: ``softmax(softcap * tanh(q @ k.T * scale / softcap) + mask) @ v``, ``[1, t, h * d]``
    """
    graph, call, tokens = state.graph, scored.call, scored.tokens
    heads, width = shape_of(call.q)[2:]
    kv_heads, length = shape_of(call.k)[2], scored.window.length
    rows = tokens if tokens == 1 else tokens * scored.groups
    q = state.given(scored.queries, [1, tokens, heads, width])
    k, v = (
        state.given(each, [1, length, kv_heads, width]) for each in (scored.keys, scored.values)
    )
    q = graph.reshape(graph.transpose(q, [0, 2, 1, 3]), [kv_heads, -1, width])
    k, v = (
        graph.reshape(graph.transpose(each, [0, 2, 1, 3]), [kv_heads, -1, width]) for each in (k, v)
    )
    scores = graph.batched(scaled(state, q, call.scale / call.softcap), k, transposed=True)
    bounded = scaled(state, graph.unary("XNNTanh", scores), call.softcap)
    shown = graph.binary("XNNAdd", bounded, state.given(scored.mask, [rows, length]))
    mixed = graph.batched(graph.unary("XNNSoftmax", shown), v)
    by_head = graph.reshape(mixed, [1, heads, -1, width])
    return graph.reshape(graph.transpose(by_head, [0, 2, 1, 3]), [1, -1, heads * width])
