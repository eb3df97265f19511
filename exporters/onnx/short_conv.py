"""Emits short convolutions over the last few tokens, and the state that they keep of them.

ONNX Runtime has a kernel of its own for this, ``CausalConvWithState``. It is not used: the state
that it returns ends with the last column of a row, which is padding where a batch's rows differ in
length, and it takes columns before tokens, so that both operands and result are transposed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import fx

from exporters.onnx import quantized
from exporters.onnx.recent import emit_before, emit_row
from exporters.onnx.state import LoweredState, Lowering
from quant.program.calls import ShortConvCall
from quant.program.program import shape_of

_ALL: Final = 1 << 31


def emit_short_conv(state: Lowering, node: fx.Node) -> None:
    """Emits the convolution as a sum of products of shifted rows.

    Given::

        %y = edgeforge::short_conv(%x, %w, %recent, %position)      # w: float[n, 3]

    Result::

        %before = Transpose(Where(begins, 0, past.N.conv))           # [batch, 2, n]
        %row = Concat(%before, %x)                                   # [batch, 2 + t, n]
        present.N.conv = Transpose(GatherND(%row, last_2_tokens))    # [batch, n, 2]
        %y = Sum(Mul(%row[:, :-2], %w[:, 0]), Mul(%row[:, 1:-1], %w[:, 1]), Mul(%row[:, 2:], ...))
    """
    call, builder, name = ShortConvCall.of(node), state.builder, state.name(node)
    columns, width = shape_of(call.weight)
    past, present = _state_names(state, state.layer_of(call.recent))
    before = emit_before(builder, name, past)
    row, recent = emit_row(builder, name, before, state.name(call.x), width - 1)
    builder.node("Transpose", [recent], present, perm=[0, 2, 1])
    taps = builder.node(
        "Transpose",
        [quantized.float_weight(state, call.weight)],
        f"{name}_taps",
        perm=[1, 0],
    )
    axis, zero_axis = (builder.constant(f"axis_{i}", np.array([i], np.int64)) for i in (1, 0))
    terms = []
    for tap in range(width):
        stop = tap - width + 1 or _ALL
        bounds = [
            builder.constant(f"{label}_{at}", np.array([at], np.int64))
            for label, at in (("from", tap), ("to", stop))
        ]
        builder.node("Slice", [row, *bounds, axis], f"{name}_shifted_{tap}")
        after = builder.constant(f"to_{tap + 1}", np.array([tap + 1], np.int64))
        builder.node("Slice", [taps, bounds[0], after, zero_axis], f"{name}_tap_{tap}")
        factors = [f"{name}_shifted_{tap}", f"{name}_tap_{tap}"]
        terms.append(builder.node("Mul", factors, f"{name}_term_{tap}"))
    builder.node("Sum", terms, name)
    state.states.append(LoweredState(past, present, "recent", (columns, width - 1)))


def _state_names(state: Lowering, layer: int) -> tuple[str, str]:
    """The names of a convolution's state, as onnxruntime-genai knows them.

    It has one name for the state of a layer that convolves and does nothing else, and another for
    that of a layer with a memory.
    """
    remembers = any(
        given.kind == "memory" and f".layers.{layer}." in given.name
        for given in state.program.inputs.values()
    )
    if remembers:
        return f"past_key_values.{layer}.conv_state", f"present.{layer}.conv_state"
    return f"past.{layer}.conv", f"present.{layer}.conv"
