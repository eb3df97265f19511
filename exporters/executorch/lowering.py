"""Walks a program and emits one method: delegates, and the kernels between them.

XNNPACK computes everything except embeddings, attention and the selection of the last token.
ExecuTorch's own kernels compute attention and hold its caches, so that a delegate ends before every
attention and the next delegate begins after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from torch import fx

from exporters.errors import ExportError
from exporters.executorch import norms, pointwise, products
from exporters.executorch.attention import attention
from exporters.executorch.convolution import short_conv
from exporters.executorch.lookups import embedding, last, quant_embedding
from exporters.executorch.method import MethodBuilder
from exporters.executorch.state import MethodLowering
from quant.program import dialect
from quant.program.program import Program, node_argument, shape_of

_KERNELS: Final[dict[object, Callable[[MethodLowering, fx.Node], None]]] = {
    dialect.EMBEDDING: embedding,
    dialect.QUANT_EMBEDDING: quant_embedding,
    dialect.ATTENTION: attention,
    dialect.LAST: last,
}


@dataclass
class _Stage:
    """A delegate, and the kernels that run after it.

    Attributes:
        nodes: the delegate's nodes, in order.
        kernels: the nodes whose kernels run after it.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    kernels: list[fx.Node] = field(default_factory=list)


def stages_of(program: Program) -> list[_Stage]:
    """Sorts a program's nodes into delegates and the kernels between them.

    A delegate's node goes into the first delegate at which all of its inputs are available. A
    kernel runs right after the delegate that computes the last of its inputs.
    """
    stage: dict[fx.Node, int] = {}
    found: list[_Stage] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is dialect.SIZE:
            continue
        sources = [source for source in node.all_input_nodes if source in stage]
        if node.target in _KERNELS:
            stage[node] = max((stage[source] for source in sources), default=0)
        else:
            stage[node] = max(
                (stage[source] + (source.target in _KERNELS) for source in sources), default=0
            )
        while len(found) <= stage[node]:
            found.append(_Stage())
        kind = found[stage[node]].kernels if node.target in _KERNELS else found[stage[node]].nodes
        kind.append(node)
    return found


def lower_method(state: MethodLowering) -> MethodBuilder:
    """Emits a whole method: for each stage the delegate, then the kernels after it.

    Raises:
        ExportError: a node has no handler.
    """
    state.begin()
    output = state.program.output()
    for stage in stages_of(state.program):
        if stage.nodes:
            _lower_delegate(state, stage, output)
        for node in stage.kernels:
            _KERNELS[node.target](state, node)
    state.method.output(state.tensors[output])
    return state.method


def _lower_delegate(state: MethodLowering, stage: _Stage, output: fx.Node) -> None:
    state.begin_delegate()
    for node in stage.nodes:
        handler = _DELEGATE_HANDLERS.get(node.target)
        if handler is None:
            raise ExportError(
                f"the ExecuTorch target has no handler for {node.target} at {node.name}"
            )
        value = handler(state, node)
        if value is not None:
            state.hold(node, value)
    state.end_delegate(stage.nodes, output)


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


_DELEGATE_HANDLERS: dict[object, Callable[[MethodLowering, fx.Node], int | None]] = {
    dialect.LINEAR: products.linear,
    dialect.QUANT_LINEAR: products.quant_linear,
    dialect.BIAS: products.bias,
    dialect.ROUND_PER_TOKEN: _round_per_token,
    dialect.RMS_NORM: norms.rms_norm,
    dialect.LAYER_NORM: norms.layer_norm,
    dialect.ROPE: _rope,
    dialect.SHORT_CONV: short_conv,
    dialect.ADD: pointwise.add,
    dialect.MUL: pointwise.mul,
    dialect.SILU: pointwise.silu,
    dialect.GELU: pointwise.gelu,
    dialect.SCALE: pointwise.scale,
    dialect.SOFTCAP: pointwise.softcap,
    dialect.CLAMP: pointwise.clamp,
    dialect.VIEW: pointwise.view,
    dialect.SPLIT: pointwise.split,
    dialect.GET: pointwise.get,
}
