"""Emits a program's nodes as nodes of one XNNPACK delegate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from torch import fx

from exporters.errors import ExportError
from exporters.executorch import norms, pointwise, products
from exporters.executorch.convolution import short_conv, token_shift
from exporters.executorch.state import MethodLowering
from quant.program import dialect
from quant.program.program import node_argument, shape_of


def emit(state: MethodLowering, nodes: Iterable[fx.Node]) -> None:
    """Emits nodes, in their order, into the current delegate.

    Raises:
        ExportError: a node has no handler.
    """
    for node in nodes:
        handler = _HANDLERS.get(node.target)
        if handler is None:
            raise ExportError(
                f"the ExecuTorch target has no handler for {node.target} at {node.name}"
            )
        value = handler(state, node)
        if value is not None:
            state.hold(node, value)


def _round_per_token(state: MethodLowering, node: fx.Node) -> int:
    """Emits nothing: `XnnpackGraph.quantized_linear` rounds before its product, as XNNPACK does."""
    return state.value(node_argument(node, 0))


def _rope(state: MethodLowering, node: fx.Node) -> int:
    graph, source = state.graph, state.value(node_argument(node, 0))
    half = shape_of(node_argument(node, 1))[1]
    dims = graph.dims(source)
    cos, sin = (
        state.rows(state.program.inputs[node_argument(node, index).name].name, half)
        for index in (1, 2)
    )
    first, second = graph.columns(source, 0, half), graph.columns(source, half, 2 * half)

    def product(value: int, table: int) -> int:
        return graph.binary("XNNMultiply", value, table)

    parts = [
        graph.binary("XNNSubtract", product(first, cos), product(second, sin)),
        graph.binary("XNNAdd", product(second, cos), product(first, sin)),
    ]
    if 2 * half < dims[-1]:
        parts.append(graph.columns(source, 2 * half, dims[-1]))
    return graph.concatenate(parts)


_HANDLERS: Final[dict[object, Callable[[MethodLowering, fx.Node], int | None]]] = {
    dialect.LINEAR: products.linear,
    dialect.QUANT_LINEAR: products.quant_linear,
    dialect.BIAS: products.bias,
    dialect.ROUND_PER_TOKEN: _round_per_token,
    dialect.RMS_NORM: norms.rms_norm,
    dialect.LAYER_NORM: norms.layer_norm,
    dialect.L2_NORM: norms.l2_norm,
    dialect.ROPE: _rope,
    dialect.SHORT_CONV: short_conv,
    dialect.TOKEN_SHIFT: token_shift,
    dialect.ADD: pointwise.add,
    dialect.MUL: pointwise.mul,
    dialect.SILU: pointwise.silu,
    dialect.SIGMOID: pointwise.sigmoid,
    dialect.TANH: pointwise.tanh,
    dialect.RELU: pointwise.relu,
    dialect.EXP: pointwise.exp,
    dialect.SOFTPLUS: pointwise.softplus,
    dialect.GELU: pointwise.gelu,
    dialect.GAIN: pointwise.gain,
    dialect.SCALE: pointwise.scale,
    dialect.SOFTCAP: pointwise.softcap,
    dialect.CLAMP: pointwise.clamp,
    dialect.VIEW: pointwise.view,
    dialect.SPLIT: pointwise.split,
    dialect.GET: pointwise.get,
}
