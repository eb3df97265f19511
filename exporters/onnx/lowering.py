"""Walks a program and emits ONNX nodes: one handler for each operator of the dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from torch import fx

from exporters.errors import ExportError
from exporters.onnx import quantized, rounded
from exporters.onnx.attention import emit_attention, match_attention, new_length
from exporters.onnx.caches import CacheScales, scales_of
from exporters.onnx.graph import MICROSOFT, GraphBuilder
from exporters.onnx.state import Lowering
from quant.program import dialect
from quant.program.calls import GetCall, NormCall, SplitCall
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
    for node in program.graph.nodes:
        if node.target is dialect.ATTENTION:
            pattern = match_attention(node)
            state.attention[node] = pattern
            state.absorbed |= pattern.absorbed
    _emit_positions(builder)
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


def _emit_positions(builder: GraphBuilder) -> None:
    """Emits the sequence lengths that the attention kernel takes, from the attention mask.

    The kernel attends to a row's first tokens, as many as its length says, so a row can be padded
    on the right alone. A row that is padded on the left gets the length 0, which the kernel refuses
    with an error; counting its tokens would attend to the padding without a word.
    """
    axis = builder.constant("axis_1", np.array([1], np.int64))
    one = builder.constant("one", np.array(1, np.int64))
    zero = builder.constant("zero", np.array(0, np.int64))
    builder.node("ReduceSum", ["attention_mask", axis], "mask_sum", keepdims=0)
    builder.node("Gather", ["attention_mask", zero], "first_is_attended", axis=1)
    builder.node("Mul", ["mask_sum", "first_is_attended"], "attended")
    builder.node("Sub", ["attended", one], "attended_less_one")
    builder.node("Cast", ["attended_less_one"], "seqlens_k", to=TensorProto.INT32)
    builder.node("Shape", ["attention_mask"], "mask_shape")
    builder.node("Gather", ["mask_shape", one], "total_length_64", axis=0)
    builder.node("Cast", ["total_length_64"], "total_length", to=TensorProto.INT32)


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


def _rms_norm(state: Lowering, node: fx.Node) -> None:
    """Emits a norm, unless it follows an addition and `_add` emits both as one operator."""
    source = node_argument(node, 0)
    if source.target is dialect.ADD and _skip_norm(source) is node:
        return
    weight = quantized.float_weight(state, node_argument(node, 1))
    state.builder.node(
        "RMSNormalization",
        [state.name(source), weight],
        state.name(node),
        axis=-1,
        epsilon=NormCall.of(node).epsilon,
        stash_type=1,
    )


def _skip_norm(add: fx.Node) -> fx.Node | None:
    norms = [user for user in add.users if user.target is dialect.RMS_NORM]
    return norms[0] if len(norms) == 1 else None


def _add(state: Lowering, node: fx.Node) -> None:
    """Fuses a residual addition with the norm that follows.

    Given::

        %s = aten::add(%x, %skip)
        %n = edgeforge::rms_norm(%s, %w, eps)

    Result::

        %n, _, _, %s = SkipSimplifiedLayerNormalization(%x, %skip, %w)
    """
    norm = _skip_norm(node)
    operands = [state.operand(node, 0), state.operand(node, 1)]
    if norm is None:
        state.builder.node("Add", operands, state.name(node))
        return
    weight = quantized.float_weight(state, node_argument(norm, 1))
    others = [user for user in node.users if user is not norm]
    state.builder.node(
        "SkipSimplifiedLayerNormalization",
        [*operands, weight],
        [state.name(norm), "", "", state.name(node)] if others else [state.name(norm)],
        domain=MICROSOFT,
        epsilon=NormCall.of(norm).epsilon,
    )


def _mul(state: Lowering, node: fx.Node) -> None:
    state.builder.node("Mul", [state.operand(node, 0), state.operand(node, 1)], state.name(node))


def _silu(state: Lowering, node: fx.Node) -> None:
    # QuickGelu is x * sigmoid(alpha * x), which is SiLU when alpha is 1.
    state.builder.node(
        "QuickGelu", [state.operand(node, 0)], state.name(node), domain=MICROSOFT, alpha=1.0
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
    indices = (
        _last_token(state.builder) if positions == 1 else _last_tokens(state.builder, positions)
    )
    state.builder.node(
        "GatherND", [state.operand(node, 0), indices], state.name(node), batch_dims=1
    )


def _last_token(builder: GraphBuilder) -> str:
    """Emits the place of each row's last attended token among the new ones: ``int64[batch, 1, 1]``.

    A first prompt has as many attended tokens as the row is long without its padding. Later tokens
    follow others, and all of them are attended, as the attention kernel demands.
    """
    if not builder.has("last_token"):
        one = builder.constant("one", np.array(1, np.int64))
        axes = builder.constant("axes_1_2", np.array([1, 2], np.int64))
        builder.node("Min", ["attended", new_length(builder)], "attended_of_new")
        builder.node("Sub", ["attended_of_new", one], "last_of_new")
        builder.node("Unsqueeze", ["last_of_new", axes], "last_token")
    return "last_token"


def _last_tokens(builder: GraphBuilder, positions: int) -> str:
    """Emits the places of each row's last attended tokens: ``int64[batch, kept, 1]``.

    ``kept`` is ``positions``, or the number of new tokens where there are fewer. A row of a batch
    with fewer attended tokens repeats its first one in front.
    """
    if not builder.has("last_tokens"):
        zero = builder.constant("zero", np.array(0, np.int64))
        one = builder.constant("one", np.array(1, np.int64))
        most = builder.constant("draft_positions", np.array(positions, np.int64))
        axis = builder.constant("axis_1", np.array([1], np.int64))
        axis_2 = builder.constant("axis_2", np.array([2], np.int64))
        builder.node("Min", ["attended", new_length(builder)], "attended_of_new")
        builder.node("Min", ["new_length", most], "kept_length")
        builder.node("Range", [zero, "kept_length", one], "kept_steps")
        builder.node("Sub", ["attended_of_new", "kept_length"], "first_kept")
        builder.node("Unsqueeze", ["first_kept", axis], "first_kept_column")
        builder.node("Add", ["first_kept_column", "kept_steps"], "kept_places")
        builder.node("Max", ["kept_places", zero], "kept_of_new")
        builder.node("Unsqueeze", ["kept_of_new", axis_2], "last_tokens")
    return "last_tokens"


def _attention(state: Lowering, node: fx.Node) -> None:
    layer = len(state.caches) // 2
    made = emit_attention(
        state.builder,
        state.attention[node],
        layer=layer,
        tables={name: table.numpy() for name, table in state.program.tables.items()},
        scales=_cache_scales(state, node),
        weight=lambda source: quantized.float_weight(state, source),
        value=state.name,
    )
    state.caches.extend(made)


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
    dialect.RMS_NORM: _rms_norm,
    dialect.ATTENTION: _attention,
    dialect.ADD: _add,
    dialect.MUL: _mul,
    dialect.SILU: _silu,
    dialect.SPLIT: _split,
    dialect.LAST: _last,
}
