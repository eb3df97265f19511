"""Emits what works element by element, and views, as nodes of a delegate."""

from __future__ import annotations

import math
from typing import Final

from torch import fx

from exporters.executorch.state import MethodLowering
from quant.program.calls import FactorCall, GainCall, GetCall, SplitCall
from quant.program.program import node_argument, shape_of

_CUBIC = 0.044715  # of GELU's form with a tanh (Hendrycks & Gimpel 2016)
SOFTPLUS_TERMS: Final = 7  # the next one is below 2e-8 of the sum


def add(state: MethodLowering, node: fx.Node) -> int:
    """Emits a sum."""
    first, second = (state.value(node_argument(node, index)) for index in (0, 1))
    return state.graph.binary("XNNAdd", first, second)


def mul(state: MethodLowering, node: fx.Node) -> int:
    """Emits a product element by element."""
    first, second = (state.value(node_argument(node, index)) for index in (0, 1))
    return state.graph.binary("XNNMultiply", first, second)


def silu(state: MethodLowering, node: fx.Node) -> int:
    """Emits ``x * sigmoid(x)``."""
    source = state.value(node_argument(node, 0))
    gate = state.graph.unary("XNNSigmoid", source)
    return state.graph.binary("XNNMultiply", source, gate)


def sigmoid(state: MethodLowering, node: fx.Node) -> int:
    """Emits ``1 / (1 + exp(-x))``."""
    return state.graph.unary("XNNSigmoid", state.value(node_argument(node, 0)))


def tanh(state: MethodLowering, node: fx.Node) -> int:
    """Emits a tanh."""
    return state.graph.unary("XNNTanh", state.value(node_argument(node, 0)))


def relu(state: MethodLowering, node: fx.Node) -> int:
    """Emits ``max(x, 0)``."""
    return state.graph.clamp(state.value(node_argument(node, 0)), 0.0, math.inf)


def exp(state: MethodLowering, node: fx.Node) -> int:
    """Emits an exponential."""
    return state.graph.unary("XNNExp", state.value(node_argument(node, 0)))


def softplus(state: MethodLowering, node: fx.Node) -> int:
    """Emits ``log(1 + exp(x))``, so that nothing overflows and small results keep their digits.

    It is ``max(x, 0) + log(1 + u)`` with ``u = exp(-abs(x))``. A logarithm of ``1 + u`` would round
    a small ``u`` to steps of 1e-7, so that the series of ``log(1 + u) = 2 * atanh(u / (2 + u))`` is
    summed up instead: ``z * (2 + 2 / 3 * z**2 + 2 / 5 * z**4 + ...)`` with ``z <= 1 / 3``.
    """
    graph, source = state.graph, state.value(node_argument(node, 0))
    u = graph.unary("XNNExp", graph.unary("XNNNegate", graph.unary("XNNAbs", source)))
    z = graph.binary("XNNDiv", u, graph.binary("XNNAdd", u, number(state, 2.0)))
    square = graph.binary("XNNMultiply", z, z)
    last, *others = (2 / (2 * term + 1) for term in reversed(range(SOFTPLUS_TERMS)))
    series = scaled(state, square, last)
    for index, factor in enumerate(others):
        if index:
            series = graph.binary("XNNMultiply", series, square)
        series = graph.binary("XNNAdd", series, number(state, factor))
    above = graph.binary("XNNMaximum", source, number(state, 0.0))
    return graph.binary("XNNAdd", above, graph.binary("XNNMultiply", z, series))


def gain(state: MethodLowering, node: fx.Node) -> int:
    """Emits a product with a weight's factor of each column or of each head."""
    graph, call = state.graph, GainCall.of(node)
    factors = graph.weight(state.weight_name(node, 1), shape_of(call.weight))
    return graph.binary("XNNMultiply", state.value(call.x), factors)


def gelu(state: MethodLowering, node: fx.Node) -> int:
    """Emits GELU: XNNPACK's own is the exact one; the form with a tanh is composed.

    ``x * (0.5 + 0.5 * tanh(sqrt(2 / pi) * x * (1 + 0.044715 * x * x)))``
    """
    graph, source = state.graph, state.value(node_argument(node, 0))
    if node.args[1] == "none":
        return graph.unary("XNNGelu", source)
    root = math.sqrt(2 / math.pi)
    cubic = scaled(state, graph.binary("XNNMultiply", source, source), root * _CUBIC)
    slope = graph.binary("XNNAdd", cubic, number(state, root))
    bent = graph.unary("XNNTanh", graph.binary("XNNMultiply", source, slope))
    half = graph.binary("XNNAdd", scaled(state, bent, 0.5), number(state, 0.5))
    return graph.binary("XNNMultiply", source, half)


def scale(state: MethodLowering, node: fx.Node) -> int:
    """Emits a factor."""
    call = FactorCall.of(node)
    return scaled(state, state.value(call.x), call.number)


def softcap(state: MethodLowering, node: fx.Node) -> int:
    """Emits ``cap * tanh(x / cap)``."""
    call = FactorCall.of(node)
    bent = state.graph.unary("XNNTanh", scaled(state, state.value(call.x), 1 / call.number))
    return scaled(state, bent, call.number)


def clamp(state: MethodLowering, node: fx.Node) -> int:
    """Emits a bound on the magnitude."""
    call = FactorCall.of(node)
    return state.graph.clamp(state.value(call.x), -call.number, call.number)


def scaled(state: MethodLowering, value: int, factor: float) -> int:
    """Emits a product with one number."""
    return state.graph.binary("XNNMultiply", value, number(state, factor))


def number(state: MethodLowering, value: float) -> int:
    """Adds one number that is not a weight: ``float32[1]``."""
    return state.graph.constant(f"number {value!r}", [value], [1])


def view(state: MethodLowering, node: fx.Node) -> int:
    """Emits a reshape."""
    return state.graph.reshape(state.value(node_argument(node, 0)), shape_of(node))


def split(state: MethodLowering, node: fx.Node) -> None:
    """Emits nothing: `get` cuts each part out where it is used."""


def get(state: MethodLowering, node: fx.Node) -> int:
    """Emits the slice that one part of a split is."""
    part = GetCall.of(node)
    of = SplitCall.of(part.split)
    start = sum(of.sizes[: part.index])
    return state.graph.columns(state.value(of.x), start, start + of.sizes[part.index])
