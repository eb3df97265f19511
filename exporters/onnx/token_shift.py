"""Emits each token's predecessor, and the state that keeps the last token."""

from __future__ import annotations

import numpy as np
from torch import fx

from exporters.onnx.recent import emit_row
from exporters.onnx.state import LoweredState, Lowering
from quant.program.calls import TokenShiftCall
from quant.program.program import shape_of


def emit_token_shift(state: Lowering, node: fx.Node) -> None:
    """Emits the row of the tokens that stand before those of the call.

    Given::

        %y = edgeforge::token_shift(%x, %recent, %position)

    Result::

        %row = ...                                              # `emit_row`, [batch, 1 + t, n]
        %y = Slice(%row, 0, -1)                                 # without the last token

    The state of a layer's mix of tokens is ``past.N.shift``, that of its mix of channels
    ``past.N.mlp_shift``.
    """
    call, builder, name = TokenShiftCall.of(node), state.builder, state.name(node)
    part = state.program.inputs[call.recent.name].name.split(".")[-2]
    kind = "shift" if part == "time_mix" else f"{part}_shift"
    layer = state.layer_of(call.recent)
    past, present = f"past.{layer}.{kind}", f"present.{layer}.{kind}"
    row = emit_row(builder, name, state.name(call.x), past, present, 1)
    first, last, axis = (
        builder.constant(label, np.array([at], np.int64))
        for label, at in (("from_0", 0), ("to_-1", -1), ("axis_1", 1))
    )
    builder.node("Slice", [row, first, last, axis], name)
    state.states.append(LoweredState(past, present, "recent", (shape_of(call.x)[-1], 1)))
