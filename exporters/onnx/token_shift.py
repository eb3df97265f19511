"""Emits each token's predecessor, and the state that keeps the last token."""

from __future__ import annotations

import numpy as np
from torch import fx

from exporters.onnx.recent import emit_before, emit_row
from exporters.onnx.state import LoweredState, Lowering
from quant.program import dialect
from quant.program.calls import TokenShiftCall
from quant.program.program import shape_of


def emit_token_shift(state: Lowering, node: fx.Node) -> None:
    """Emits the row of the tokens that stand before those of the call.

    The shifts of a layer share one state, a token for each in their order, because that is how
    onnxruntime-genai keeps a layer's states: one of recent tokens, and one memory.

    Given::

        %y = edgeforge::token_shift(%x, %recent, %position)     # the first of a layer's two

    Result::

        %before = Transpose(Where(begins, 0, past))             # [batch, 2, n], once for a layer
        %row = Concat(Slice(%before, 0, 1), %x)                 # [batch, 1 + t, n]
        %y = Slice(%row, 0, -1)                                 # without the last token
        present = Transpose(Concat(%row's last, ...))           # [batch, n, 2], once for a layer
    """
    call, builder, name = TokenShiftCall.of(node), state.builder, state.name(node)
    layer, width = state.layer_of(call.recent), shape_of(call.x)[-1]
    shifts = _shifts(state, layer)
    at, count = shifts.index(node), len(shifts)
    past, present = (f"{side}.{layer}.conv_state" for side in ("past_key_values", "present"))
    before = f"layer_{layer}_before"
    if at == 0:
        emit_before(builder, f"layer_{layer}", past)
        state.states.append(LoweredState(past, present, "recent", (width, count)))
    first, after, start, end, axis = (
        builder.constant(label, np.array([number], np.int64))
        for label, number in (
            (f"from_{at}", at),
            (f"to_{at + 1}", at + 1),
            ("from_0", 0),
            ("to_-1", -1),
            ("axis_1", 1),
        )
    )
    builder.node("Slice", [before, first, after, axis], f"{name}_before")
    row, _ = emit_row(builder, name, f"{name}_before", state.name(call.x), 1)
    builder.node("Slice", [row, start, end, axis], name)
    if at == count - 1:
        last = [f"{state.name(each)}_recent" for each in shifts]
        builder.node("Concat", last, f"layer_{layer}_recent", axis=1)
        builder.node("Transpose", [f"layer_{layer}_recent"], present, perm=[0, 2, 1])


def _shifts(state: Lowering, layer: int) -> list[fx.Node]:
    """The shifts of a layer, in their order."""
    return [
        node
        for node in state.program.graph.nodes
        if node.target is dialect.TOKEN_SHIFT
        and state.layer_of(TokenShiftCall.of(node).recent) == layer
    ]
