"""Emits norms as nodes of a delegate.

The schema of XNNPACK's graphs has no mean and no sum over the last dimension, so that a mean is a
product with a row of 1/n, and a sum one with a row of ones.
"""

from __future__ import annotations

from torch import fx

from exporters.executorch.state import MethodLowering
from exporters.executorch.xnnpack_graph import XnnpackGraph
from quant.program.calls import LayerNormCall, NormCall
from quant.program.program import node_argument


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


def l2_norm(state: MethodLowering, node: fx.Node) -> int:
    """Emits ``x * rsqrt(sum(x * x) + epsilon)``."""
    graph, source, epsilon = state.graph, state.value(node_argument(node, 0)), node.args[1]
    assert isinstance(epsilon, float)
    return _divided(graph, source, epsilon, total(graph, _squares(graph, source)))


def total(graph: XnnpackGraph, source: int) -> int:
    """Emits the sum over the last dimension."""
    width = graph.dims(source)[-1]
    return graph.linear(source, graph.constant(f"sum of {width}", [1.0] * width, [1, width]))


def _divided(graph: XnnpackGraph, source: int, epsilon: float, spread: int | None = None) -> int:
    """Emits ``source * rsqrt(spread + epsilon)``; without a spread, the mean of squares."""
    small = graph.constant(f"epsilon {epsilon}", [epsilon], [1])
    spread = _mean(graph, _squares(graph, source)) if spread is None else spread
    root = graph.unary("XNNReciprocalSquareRoot", graph.binary("XNNAdd", spread, small))
    return graph.binary("XNNMultiply", source, root)


def _squares(graph: XnnpackGraph, source: int) -> int:
    return graph.binary("XNNMultiply", source, source)


def _mean(graph: XnnpackGraph, source: int) -> int:
    width = graph.dims(source)[-1]
    row = graph.constant(f"mean of {width}", [1 / width] * width, [1, width])
    return graph.linear(source, row)
