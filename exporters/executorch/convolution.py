"""Emits short convolutions and shifts; the tokens before a run are a state outside of delegates."""

from __future__ import annotations

from torch import fx

from exporters.executorch.products import bias_within
from exporters.executorch.state import MethodLowering
from quant.program.calls import ShortConvCall, TokenShiftCall
from quant.program.program import shape_of


def short_conv(state: MethodLowering, node: fx.Node) -> int:
    """Emits a convolution over the last few tokens.

    The tokens before these come from a state that kernels read before the delegate and write after
    it. At position 0 they are zeros, whatever the state holds; they are chosen by a condition and
    not by a factor, because memory that nothing was written to may hold NaN.

    Given: ``x: float32[1, t, n]``, ``recent: float32[1, w - 1, n]``
    Result: ``row = [where(position > 0, recent, 0), x]``, the convolution of ``row`` without
    padding, and ``recent = row[-(w - 1):]``
    """
    call = ShortConvCall.of(node)
    graph, source = state.graph, state.value(call.x)
    columns, width = shape_of(call.weight)
    before = state.recent(call.recent)
    row = graph.concatenate([before, source], axis=1)
    state.remember(row, call.recent)
    name = state.weight_name(node, 1)
    return graph.depthwise(row, name, columns, width, bias_within(state, node))


def token_shift(state: MethodLowering, node: fx.Node) -> int:
    """Emits each token's predecessor, a convolution whose taps are 1 and 0; see `short_conv`.

    XNNPACK has no slice that leaves out the last of a number of rows which varies.
    """
    call = TokenShiftCall.of(node)
    graph, source = state.graph, state.value(call.x)
    row = graph.concatenate([state.recent(call.recent), source], axis=1)
    state.remember(row, call.recent)
    return graph.previous(row)
