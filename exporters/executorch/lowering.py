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
from exporters.executorch.attention import attention
from exporters.executorch.lookups import embedding, last, quant_embedding
from exporters.executorch.method import MethodBuilder
from exporters.executorch.state import MethodLowering, kept_columns
from exporters.float_columns import ALL
from quant.program import dialect
from quant.program.calls import GetCall, NormCall, QuantizedCall, SplitCall
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


def _linear(state: MethodLowering, node: fx.Node) -> int:
    source = state.value(node_argument(node, 0))
    name = state.weight_name(node, 1)
    weight = state.graph.weight(name, shape_of(node_argument(node, 1)))
    return state.graph.linear(source, weight)


def _quant_linear(state: MethodLowering, node: fx.Node) -> int:
    call = QuantizedCall.of(node)
    graph, name, source = state.graph, state.weight_name(node, 1), state.value(call.source)
    kept = kept_columns(state, node)
    if kept:
        state.kept[name] = kept
    if kept == ALL:
        return graph.exact_linear(source, name, call.integers, call.shape[0])
    if kept:
        return graph.parted_linear(source, name, call.integers, call.shape[0], kept)
    return graph.quantized_linear(source, name, call.integers, call.shape[0])


def _round_per_token(state: MethodLowering, node: fx.Node) -> int:
    """Emits nothing: `XnnpackGraph.quantized_linear` rounds before its product, as XNNPACK does."""
    return state.value(node_argument(node, 0))


def _rms_norm(state: MethodLowering, node: fx.Node) -> int:
    """Emits RMSNorm, with the mean of squares as a product with a row of 1/n.

    The schema of XNNPACK's graphs has no mean over the last dimension.
    """
    graph, source = state.graph, state.value(node_argument(node, 0))
    width = graph.dims(source)[-1]
    eps = NormCall.of(node).epsilon
    mean = graph.constant(f"mean of {width}", [1 / width] * width, [1, width])
    small = graph.constant(f"epsilon {eps}", [eps], [1])
    squares = graph.binary("XNNMultiply", source, source)
    spread = graph.binary("XNNAdd", graph.linear(squares, mean), small)
    normed = graph.binary("XNNMultiply", source, graph.unary("XNNReciprocalSquareRoot", spread))
    weight = graph.weight(state.weight_name(node, 1), [width])
    return graph.binary("XNNMultiply", normed, weight)


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


def _add(state: MethodLowering, node: fx.Node) -> int:
    first, second = (state.value(node_argument(node, index)) for index in (0, 1))
    return state.graph.binary("XNNAdd", first, second)


def _mul(state: MethodLowering, node: fx.Node) -> int:
    first, second = (state.value(node_argument(node, index)) for index in (0, 1))
    return state.graph.binary("XNNMultiply", first, second)


def _silu(state: MethodLowering, node: fx.Node) -> int:
    source = state.value(node_argument(node, 0))
    gate = state.graph.unary("XNNSigmoid", source)
    return state.graph.binary("XNNMultiply", source, gate)


def _view(state: MethodLowering, node: fx.Node) -> int:
    return state.graph.reshape(state.value(node_argument(node, 0)), shape_of(node))


def _split(state: MethodLowering, node: fx.Node) -> None:
    """Emits nothing: `_get` cuts each part out where it is used."""


def _get(state: MethodLowering, node: fx.Node) -> int:
    part = GetCall.of(node)
    split = SplitCall.of(part.split)
    start = sum(split.sizes[: part.index])
    return state.graph.columns(state.value(split.x), start, start + split.sizes[part.index])


_DELEGATE_HANDLERS: dict[object, Callable[[MethodLowering, fx.Node], int | None]] = {
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.ROUND_PER_TOKEN: _round_per_token,
    dialect.RMS_NORM: _rms_norm,
    dialect.ROPE: _rope,
    dialect.ADD: _add,
    dialect.MUL: _mul,
    dialect.SILU: _silu,
    dialect.VIEW: _view,
    dialect.SPLIT: _split,
    dialect.GET: _get,
}
