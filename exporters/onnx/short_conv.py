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
from exporters.onnx.recent import emit_row
from exporters.onnx.state import LoweredState, Lowering
from quant.program.calls import ShortConvCall
from quant.program.program import shape_of

_ALL: Final = 1 << 31


def emit_short_conv(state: Lowering, node: fx.Node) -> None:
    """Emits the convolution as a sum of products of shifted rows.

    Given::

        %y = edgeforge::short_conv(%x, %w, %recent, %position)      # w: float[n, 3]

    Result::

        %row = ...                  # the last 2 tokens and %x (`emit_row`): [batch, 2 + t, n]
        %y = Sum(Mul(%row[:, :-2], %w[:, 0]), Mul(%row[:, 1:-1], %w[:, 1]), Mul(%row[:, 2:], ...))
    """
    call, builder, name = ShortConvCall.of(node), state.builder, state.name(node)
    columns, width = shape_of(call.weight)
    layer = state.layer_of(call.recent)
    past, present = f"past.{layer}.conv", f"present.{layer}.conv"
    row = emit_row(builder, name, state.name(call.x), past, present, width - 1)
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
