"""Walks a program and emits one function of a package: a handler for each operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import fx

from exporters.coreml.attention import Attention
from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Value
from exporters.coreml.norms import scaled_rms_norm, wide_rms_norm
from exporters.coreml.state import FunctionLowering
from exporters.coreml.weights import Weight
from exporters.errors import ExportError
from quant.program import dialect
from quant.program.calls import NormCall, SplitCall


def lower_function(state: FunctionLowering) -> Emitter:
    """Emits a whole function.

    Raises:
        ExportError: a node that has no handler.
    """
    # Attention keeps masks and caches that all layers share, so its handlers are an object's.
    attention = Attention(state)
    shared = {dialect.ROPE: attention.rope, dialect.ATTENTION: attention.emit}
    for node in state.program.graph.nodes:
        if node.op != "call_function" or node.target in (dialect.GET, dialect.SIZE):
            continue  # the split's handler names what GET gives; sizes are operands of views only
        if node.target in shared:
            value = shared[node.target](node)
        elif node.target in HANDLERS:
            value = HANDLERS[node.target](state, node)
        else:
            raise ExportError(f"the Core ML target has no handler for {node.target} at {node.name}")
        state.hold(node, value)
    state.emitter.output(state.result(state.program.output()))
    attention.outputs()
    return state.emitter


def _product(state: FunctionLowering, node: fx.Node, weight: Weight) -> Value:
    """Emits ``x @ weight.T`` in the weight's dtype and casts the result to float16."""
    emitter, name = state.emitter, state.name(node)
    dtype = weight.value.dtype
    zeros = np.zeros(weight.value.shape[0], np.float32 if dtype == "fp32" else np.float16)
    bias = state.bank.table(emitter, f"no_bias_{dtype}_{len(zeros)}", zeros)
    x = emitter.cast(f"{name}_wide_input", state.value(node, 0), dtype)
    raw = name if weight.descale is None and dtype == "fp16" else f"{name}_raw"
    product = emitter.linear(raw, x, weight.value, bias)
    if weight.descale is not None:
        product = emitter.binary("mul", name, product, weight.descale)
    return emitter.cast(name, product, "fp16")


def _rows(state: FunctionLowering, node: fx.Node, weight: Weight) -> Value:
    """Emits the table's rows for the tokens, as float16."""
    emitter, name = state.emitter, state.name(node)
    raw = name if weight.descale is None and weight.value.dtype == "fp16" else f"{name}_raw"
    rows = emitter.gather_rows(raw, weight.value, state.ids)
    if weight.descale is not None:
        factors = emitter.gather_rows(f"{name}_factors", weight.descale, state.ids)
        column = emitter.reshape(f"{name}_factor_column", factors, (*factors.shape, 1))
        rows = emitter.binary("mul", name, rows, column)
    return emitter.cast(name, rows, "fp16")


def _embedding(state: FunctionLowering, node: fx.Node) -> Value:
    return _rows(state, node, Weight(state.floating(node)))


def _quant_embedding(state: FunctionLowering, node: fx.Node) -> Value:
    return _rows(state, node, state.quantized(node))


def _linear(state: FunctionLowering, node: fx.Node) -> Value:
    return _product(state, node, Weight(state.floating(node)))


def _quant_linear(state: FunctionLowering, node: fx.Node) -> Value:
    return _product(state, node, state.quantized(node))


def _round_per_tensor(state: FunctionLowering, node: fx.Node) -> Value:
    scale = state.bank.input_scale(state.emitter, state.weight_name(node))
    return state.emitter.round_to_bytes(state.name(node), state.value(node, 0), scale)


def _rms_norm(state: FunctionLowering, node: fx.Node) -> Value:
    epsilon = NormCall.of(node).epsilon
    norm = wide_rms_norm if state.style.wide else scaled_rms_norm
    return norm(
        state.emitter, state.name(node), state.value(node, 0), state.floating(node), epsilon
    )


def _add(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.binary("add", state.name(node), state.value(node, 0), state.value(node, 1))


def _mul(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.binary("mul", state.name(node), state.value(node, 0), state.value(node, 1))


def _silu(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.unary("silu", state.name(node), state.value(node, 0))


def _view(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.reshape(state.name(node), state.value(node, 0), state.dims(node))


def _split(state: FunctionLowering, node: fx.Node) -> Value:
    sizes = SplitCall.of(node).sizes
    names = [f"{state.name(node)}_part_{index}" for index in range(len(sizes))]
    source = state.value(node, 0)
    state.split_results(node, state.emitter.split(names, source, sizes))
    return source


def _last(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.last_position(state.name(node), state.value(node, 0))


HANDLERS: dict[object, Callable[[FunctionLowering, fx.Node], Value]] = {
    dialect.EMBEDDING: _embedding,
    dialect.QUANT_EMBEDDING: _quant_embedding,
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.ROUND_PER_TENSOR: _round_per_tensor,
    dialect.RMS_NORM: _rms_norm,
    dialect.ADD: _add,
    dialect.MUL: _mul,
    dialect.SILU: _silu,
    dialect.VIEW: _view,
    dialect.SPLIT: _split,
    dialect.LAST: _last,
}
