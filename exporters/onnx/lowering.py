"""Walks a program and emits ONNX nodes: one handler for each operator of the dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from torch import fx

from exporters.errors import ExportError
from exporters.onnx import elementwise, experts, norms, quantized, rounded, routing
from exporters.onnx.attention import emit_attention, match_attention
from exporters.onnx.caches import CacheScales, scales_of
from exporters.onnx.graph import MICROSOFT, GraphBuilder
from exporters.onnx.positions import emit_positions, last_token, last_tokens
from exporters.onnx.recurrence import emit_recurrence, emit_view
from exporters.onnx.short_conv import emit_short_conv
from exporters.onnx.state import LoweredState, Lowering
from exporters.onnx.token_shift import emit_token_shift
from quant.program import dialect
from quant.program.calls import AttentionCall, GetCall, SplitCall
from quant.program.program import Program, node_argument
from quant.store.store import WeightStore

if TYPE_CHECKING:
    from exporters.float_columns import FloatColumns
    from exporters.target import CacheRanges


def lower(
    program: Program,
    store: WeightStore,
    builder: GraphBuilder,
    cache_ranges: CacheRanges,
    float_columns: FloatColumns,
) -> Lowering:
    """Emits every node of the program into the builder.

    Args:
        program: the program, in the quantized or the lowered dialect.
        store: the store of the weights that the program names.
        builder: the graph to add to.
        cache_ranges: the range of every int8 cache; empty for float32 caches.
        float_columns: the columns whose activations are to stay float32, by weight.

    Raises:
        ExportError: a node has no handler, or dimensions that the kernels cannot hold.
    """
    state = Lowering(
        program, store, builder, cache_ranges=cache_ranges, float_columns=float_columns
    )
    experts.find_mixtures(state)
    for node in program.graph.nodes:
        state.absorbed |= set(quantized.bias_within(node))
        if node.target is dialect.ATTENTION:
            pattern = match_attention(node)
            state.attention[node] = pattern
            state.absorbed |= pattern.absorbed
    emit_positions(builder, attends=bool(state.attention))
    for node in program.graph.nodes:
        if node.op != "call_function" or node in state.absorbed:
            continue
        if node.target is dialect.GET or node.target is dialect.SIZE:
            continue  # `_split` names what GET gives; sizes are operands of absorbed views only
        handler = HANDLERS.get(node.target)
        if handler is None:
            raise ExportError(f"the ONNX target has no handler for {node.target} at {node.name}")
        handler(state, node)
    return state


def _embedding(state: Lowering, node: fx.Node) -> None:
    table = quantized.float_weight(state, node_argument(node, 1), as_table=True)
    rows = state.builder.node("Gather", [table, "input_ids"], f"{node.name}_rows")
    state.builder.node("Cast", [rows], state.name(node), to=TensorProto.FLOAT)


def _linear(state: Lowering, node: fx.Node) -> None:
    weight = quantized.float_weight(state, node_argument(node, 1))
    state.builder.node(
        "FusedMatMul",
        [state.operand(node, 0), weight],
        state.name(node),
        domain=MICROSOFT,
        transA=0,
        transB=1,
        alpha=1.0,
    )


def _split(state: Lowering, node: fx.Node) -> None:
    sizes = SplitCall.of(node).sizes
    lengths = state.builder.constant(
        "split_" + "_".join(map(str, sizes)), np.array(sizes, np.int64)
    )
    outputs = [f"{node.name}_{index}" for index in range(len(sizes))]
    for user in node.users:
        state.names[user] = outputs[GetCall.of(user).index]
    state.builder.node("Split", [state.operand(node, 0), lengths], outputs, axis=-1)


def _last(state: Lowering, node: fx.Node) -> None:
    """Selects each row's last attended token, or its last few.

    Given::

        %l = aten::slice(%x, 1, -1, max)      # [1, t, columns]: the row's last token

    Result::

        %l = GatherND(%x, last_token)         # [batch, 1, columns]: of each row its own last token

    onnxruntime-genai pads the shorter prompts of a batch on the right, so that the last column
    holds padding.
    """
    positions = node.meta["positions"]
    indices = last_token(state.builder) if positions == 1 else last_tokens(state.builder, positions)
    if node_argument(node, 0).target in dialect.ROUTES:
        routing.emit_last_choice(state, node, indices)
        return
    state.builder.node(
        "GatherND", [state.operand(node, 0), indices], state.name(node), batch_dims=1
    )


def _attention(state: Lowering, node: fx.Node) -> None:
    made = emit_attention(
        state.builder,
        state.attention[node],
        layer=state.layer_of(AttentionCall.of(node).key_cache),
        table=lambda source: _table(state, source),
        scales=_cache_scales(state, node),
        weight=lambda source: quantized.float_weight(state, source),
        value=state.name,
    )
    state.states.extend(
        LoweredState(past, present, "cache", shape) for past, present, shape in made
    )


def _table(state: Lowering, placeholder: fx.Node) -> str:
    """The initializer of a table of cosines or sines."""
    name = state.program.inputs[placeholder.name].name
    return state.builder.table(name, state.program.tables[name].numpy())


def _cache_scales(state: Lowering, node: fx.Node) -> CacheScales | None:
    if not state.cache_ranges:
        return None
    names = [state.program.inputs[node_argument(node, index).name].name for index in (3, 4)]
    return scales_of(*(state.cache_ranges[name] for name in names))


def _quant_linear(state: Lowering, node: fx.Node) -> None:
    emit: dict[object, Callable[[Lowering, fx.Node], None]] = {
        dialect.ROUND_PER_TOKEN: rounded.emit_per_token_linear,
        dialect.ROUND_PER_TENSOR: rounded.emit_per_tensor_linear,
    }
    emit.get(node_argument(node, 0).target, quantized.emit_linear)(state, node)


def _quant_embedding(state: Lowering, node: fx.Node) -> None:
    quantized.emit_embedding(state, node)


HANDLERS: dict[object, Callable[[Lowering, fx.Node], None]] = {
    dialect.EMBEDDING: _embedding,
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.QUANT_EMBEDDING: _quant_embedding,
    dialect.ROUND_PER_TOKEN: rounded.emit_per_token,
    dialect.ROUND_PER_TENSOR: rounded.emit_per_tensor,
    dialect.RMS_NORM: norms.emit_rms_norm,
    dialect.LAYER_NORM: norms.emit_layer_norm,
    dialect.ATTENTION: _attention,
    dialect.SHORT_CONV: emit_short_conv,
    dialect.RECURRENCE: emit_recurrence,
    dialect.TOKEN_SHIFT: emit_token_shift,
    dialect.VIEW: emit_view,
    dialect.ROUTE: routing.emit_route,
    dialect.ROUTE_SPARSE_MIXER: routing.emit_sparse_mixer,
    dialect.CHOSEN: experts.emit_chosen,
    dialect.CHOSEN_SLOTS: experts.emit_chosen,
    dialect.COMBINE: experts.emit_combine,
    dialect.SLOTS: experts.emit_slots,
    dialect.ADD: norms.emit_add,
    dialect.L2_NORM: norms.emit_l2_norm,
    dialect.BIAS: elementwise.emit_bias,
    dialect.GAIN: elementwise.emit_gain,
    dialect.MUL: elementwise.emit_mul,
    dialect.SILU: elementwise.emit_silu,
    dialect.SIGMOID: elementwise.emit_sigmoid,
    dialect.TANH: elementwise.emit_function,
    dialect.RELU: elementwise.emit_function,
    dialect.EXP: elementwise.emit_function,
    dialect.SOFTPLUS: elementwise.emit_function,
    dialect.GELU: elementwise.emit_gelu,
    dialect.SCALE: elementwise.emit_scale,
    dialect.SOFTCAP: elementwise.emit_softcap,
    dialect.CLAMP: elementwise.emit_clamp,
    dialect.SPLIT: _split,
    dialect.LAST: _last,
}
