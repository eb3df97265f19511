"""Emits norms as nodes of a delegate.

The schema of XNNPACK's graphs has no mean over the last dimension, so that a mean is a product with
a row of 1/n.
"""

from __future__ import annotations

from torch import fx

from exporters.executorch.state import MethodLowering
from exporters.executorch.xnnpack_graph import XnnpackGraph
from quant.program.calls import LayerNormCall, NormCall


def rms_norm(state: MethodLowering, node: fx.Node) -> int:
    """Emits RMSNorm: ``x * rsqrt(mean(x * x) + epsilon) * weight``."""
    graph, call = state.graph, NormCall.of(node)
    source = state.value(call.x)
    width = graph.dims(source)[-1]
    normed = _divided(graph, source, call.epsilon)
    weight = graph.weight(state.weight_name(node, 1), [width])
    return graph.binary("XNNMultiply", normed, weight)


def layer_norm(state: MethodLowering, node: fx.Node) -> int:
    """Emits LayerNorm; the mean is subtracted before anything is squared, so nothing cancels."""
    graph, call = state.graph, LayerNormCall.of(node)
    source = state.value(call.x)
    width = graph.dims(source)[-1]
    centred = graph.binary("XNNSubtract", source, _mean(graph, source))
    result = _divided(graph, centred, call.epsilon)
    if call.weight is not None:
        weight = graph.weight(state.weight_name(node, 1), [width])
        result = graph.binary("XNNMultiply", result, weight)
    if call.bias is not None:
        shift = graph.weight(state.weight_name(node, 2), [width])
        result = graph.binary("XNNAdd", result, shift)
    return result


def _divided(graph: XnnpackGraph, source: int, epsilon: float) -> int:
    """Emits ``source * rsqrt(mean(source * source) + epsilon)``."""
    small = graph.constant(f"epsilon {epsilon}", [epsilon], [1])
    squares = graph.binary("XNNMultiply", source, source)
    spread = graph.binary("XNNAdd", _mean(graph, squares), small)
    return graph.binary("XNNMultiply", source, graph.unary("XNNReciprocalSquareRoot", spread))


def _mean(graph: XnnpackGraph, source: int) -> int:
    width = graph.dims(source)[-1]
    row = graph.constant(f"mean of {width}", [1 / width] * width, [1, width])
    return graph.linear(source, row)
