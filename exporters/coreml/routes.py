"""Emits what gives each token its weights of a mixture's experts (`quant.program.expert_ops`).

MIL does not say in which order ``topk`` returns equal elements. So only the smallest of the
largest few is taken from it, and of the elements that equal that one the first stay. A weight is
dropped where a comparison holds: one that is NaN fails them all, and is seen in the results.
"""

from __future__ import annotations

from typing import Final

from torch import fx

from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Value
from exporters.coreml.state import FunctionLowering
from quant.program.calls import RouteCall, SparseMixerCall

# Far below every logit, and within the dtype: softmax makes it 0.
_LOWEST: Final = {"fp16": -65504.0, "fp32": -1e38}


def emit_route(state: FunctionLowering, node: fx.Node) -> Value:
    """Emits ``edgeforge::route``.

    Given::

        %r = edgeforge::route(%logits, k, normalized)

    Result::

        shares = softmax(logits)
        least = reduce_min(topk(shares, k))
        room = k - reduce_sum(shares > least)
        dropped = shares < least or (shares == least and cumsum(shares == least) > room)
        r = select(dropped, 0, shares)       # divided by their sum where `normalized` says so
    """
    call, emitter, name = RouteCall.of(node), state.emitter, state.name(node)
    shares = emitter.softmax(f"{name}_shares", _logits(state, node))
    largest = emitter.largest(f"{name}_largest", shares, call.chosen)
    least = emitter.reduce("reduce_min", f"{name}_least", largest)
    above = emitter.binary("greater", f"{name}_above", shares, least)
    number = emitter.reduce("reduce_sum", f"{name}_number_above", _ones(emitter, above, shares))
    count = emitter.constant(float(call.chosen), shares.dtype)
    room = emitter.binary("sub", f"{name}_room", count, number)
    equal = emitter.binary("equal", f"{name}_equal", shares, least)
    place = emitter.running_sum(f"{name}_place", _ones(emitter, equal, shares))
    behind = emitter.binary("greater", f"{name}_behind", place, room)
    late = emitter.binary("logical_and", f"{name}_late", equal, behind)
    below = emitter.binary("less", f"{name}_below", shares, least)
    dropped = emitter.binary("logical_or", f"{name}_dropped", below, late)
    if not call.normalized:
        return emitter.replace(name, shares, dropped, 0.0)
    kept = emitter.replace(f"{name}_kept", shares, dropped, 0.0)
    total = emitter.reduce("reduce_sum", f"{name}_sum", kept)
    return emitter.binary("real_div", name, kept, total)


def emit_sparse_mixer(state: FunctionLowering, node: fx.Node) -> Value:
    """Emits ``edgeforge::route_sparse_mixer``.

    Given::

        %r = edgeforge::route_sparse_mixer(%logits, jitter)

    Result, for the first choice; the second is made as this one, of the logits without the
    first, and both are added::

        most = reduce_max(logits)
        far = (most - logits) / maximum(abs(logits), most) > 2 * jitter
        others = logits < most or cumsum(logits == most) > 1
        first = select(others, 0, softmax(select(far, lowest, logits)))
    """
    call, emitter, name = SparseMixerCall.of(node), state.emitter, state.name(node)
    logits = left = _logits(state, node)
    sizes = emitter.unary("abs", f"{name}_sizes", logits)
    lowest, made = _LOWEST[logits.dtype], []
    for turn in ("first", "second"):
        at = f"{name}_{turn}"
        most = emitter.reduce("reduce_max", f"{at}_most", left)
        distance = emitter.binary("sub", f"{at}_distance", most, logits)
        scale = emitter.binary("maximum", f"{at}_scale", sizes, most)
        relative = emitter.binary("real_div", f"{at}_relative", distance, scale)
        far = emitter.binary("greater", f"{at}_far", relative, 2 * call.jitter)
        near = emitter.replace(f"{at}_near", left, far, lowest)
        shares = emitter.softmax(f"{at}_shares", near)
        equal = emitter.binary("equal", f"{at}_equal", left, most)
        place = emitter.running_sum(f"{at}_place", _ones(emitter, equal, left))
        behind = emitter.binary("greater", f"{at}_behind", place, 1.0)
        below = emitter.binary("less", f"{at}_below", left, most)
        others = emitter.binary("logical_or", f"{at}_others", below, behind)
        made.append(emitter.replace(at, shares, others, 0.0))
        if turn == "first":
            one = emitter.unary("logical_not", f"{at}_one", others)
            left = emitter.replace(f"{at}_left", left, one, lowest)
    return emitter.binary("add", name, *made)


def _logits(state: FunctionLowering, node: fx.Node) -> Value:
    """The router's logits, in float32 for the GPU."""
    x, dtype = state.given(node, 0), "fp32" if state.style.wide else "fp16"
    return state.emitter.cast_once(f"{x.name}_as_{dtype}", x, dtype)


def _ones(emitter: Emitter, condition: Value, like: Value) -> Value:
    """1 where a condition holds and 0 elsewhere, in another value's dtype."""
    return emitter.cast(f"{condition.name}_as_{like.dtype}", condition, like.dtype)
