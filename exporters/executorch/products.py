"""Emits products and what is added to them as nodes of a delegate."""

from __future__ import annotations

from torch import fx

from exporters.executorch.state import MethodLowering, kept_columns
from exporters.float_columns import ALL
from quant.program import dialect
from quant.program.calls import QuantizedCall
from quant.program.program import node_argument, shape_of

# XNNPACK adds a bias within these; elsewhere it is an addition of its own.
_WITH_BIAS = (dialect.LINEAR, dialect.QUANT_LINEAR, dialect.SHORT_CONV)


def linear(state: MethodLowering, node: fx.Node) -> int:
    """Emits a product with a float weight."""
    source = state.value(node_argument(node, 0))
    name = state.weight_name(node, 1)
    weight = state.graph.weight(name, shape_of(node_argument(node, 1)))
    return state.graph.linear(source, weight, bias_within(state, node))


def quant_linear(state: MethodLowering, node: fx.Node) -> int:
    """Emits a product with an integer weight, some or all of whose activations stay float32."""
    call = QuantizedCall.of(node)
    graph, name, source = state.graph, state.weight_name(node, 1), state.value(call.source)
    kept, added = kept_columns(state, node), bias_within(state, node)
    if kept:
        state.kept[name] = kept
    if kept == ALL:
        exact = graph.exact_linear(source, name, call.integers, call.shape[0])
        return exact if added is None else graph.binary("XNNAdd", exact, added)
    if kept:
        return graph.parted_linear(source, name, call.integers, call.shape[0], kept, added)
    return graph.quantized_linear(source, name, call.integers, call.shape[0], added)


def bias_within(state: MethodLowering, node: fx.Node) -> int | None:
    """The vector that a product's only user adds to it, which the product's own node then adds."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not dialect.BIAS:
        return None
    return _vector(state, users[0])


def bias(state: MethodLowering, node: fx.Node) -> int:
    """Emits nothing where the product before it adds the bias (`bias_within`), else an addition."""
    source = node_argument(node, 0)
    value = state.value(source)
    if source.target in _WITH_BIAS and len(source.users) == 1:
        return value
    return state.graph.binary("XNNAdd", value, _vector(state, node))


def _vector(state: MethodLowering, node: fx.Node) -> int:
    return state.graph.weight(state.weight_name(node, 1), shape_of(node_argument(node, 1)))
