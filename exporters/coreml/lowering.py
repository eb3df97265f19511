"""Walks a program and emits one function of a package: a handler for each operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import fx

from exporters.coreml.attention import Attention
from exporters.coreml.carried import Carried
from exporters.coreml.convolution import ShortConvolution
from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Value
from exporters.coreml.mixtures import Mixtures
from exporters.coreml.norms import (
    scaled_layer_norm,
    scaled_rms_norm,
    unit_norm,
    wide_layer_norm,
    wide_rms_norm,
)
from exporters.coreml.positions import Positions
from exporters.coreml.recent import RecentRows
from exporters.coreml.recurrence import Recurrences
from exporters.coreml.rotary import Rotary
from exporters.coreml.routes import emit_route, emit_sparse_mixer
from exporters.coreml.state import FunctionLowering
from exporters.coreml.token_shift import TokenShift
from exporters.coreml.weights import Weight
from exporters.errors import ExportError
from quant.program import dialect
from quant.program.calls import FactorCall, LayerNormCall, NormCall, SplitCall
from quant.program.program import node_argument


def lower_function(state: FunctionLowering) -> Emitter:
    """Emits a whole function.

    Raises:
        ExportError: a node that has no handler.
    """
    # These handlers are objects' that keep what all layers share: positions, masks, states.
    positions, carried = Positions(state), Carried(state)
    recent = RecentRows(state, positions, carried)

    def lower(node: fx.Node) -> None:
        if node.target in (dialect.GET, dialect.SIZE):
            return  # the split's handler names what GET gives; sizes are operands of views only
        if state.holds(node):
            return  # a bias that the product before it adds
        if node.target in shared:
            value = shared[node.target](node)
        elif node.target in HANDLERS:
            value = HANDLERS[node.target](state, node)
        else:
            raise ExportError(f"the Core ML target has no handler for {node.target} at {node.name}")
        state.hold(node, value)

    mixtures = Mixtures(state, lower)
    shared: dict[object, Callable[[fx.Node], Value]] = {
        dialect.ROPE: Rotary(state, positions).emit,
        dialect.ATTENTION: Attention(state, positions, carried).emit,
        dialect.SHORT_CONV: ShortConvolution(state, recent).emit,
        dialect.TOKEN_SHIFT: TokenShift(state, recent).emit,
        dialect.RECURRENCE: Recurrences(state, positions, carried).emit,
        dialect.COMBINE: mixtures.emit,
        dialect.SLOTS: mixtures.emit,
    }
    for node in state.program.graph.nodes:
        if node.op == "call_function" and not mixtures.owns(node):
            lower(node)
    state.emitter.output(state.result(state.program.output()))
    carried.outputs()
    return state.emitter


def _product(state: FunctionLowering, node: fx.Node, weight: Weight) -> Value:
    """Emits ``x @ weight.T`` in the weight's dtype; a router's stays float32, all else is float16.

    A bias that alone reads the product is added within it where that is exact.
    """
    emitter = state.emitter
    dtype, rows = weight.value.dtype, weight.value.shape[0]
    adding = _bias_of(node) if weight.descale is None else None
    bias = None if adding is None else state.bank.bias(emitter, state.weight_name(adding), dtype)
    name = state.name(node if bias is None or adding is None else adding)
    if bias is None:
        zeros = np.zeros(rows, np.float32 if dtype == "fp32" else np.float16)
        bias = state.bank.table(emitter, f"no_bias_{dtype}_{rows}", zeros)
        adding = None
    result = "fp32" if state.stays_wide(node) else "fp16"
    given = state.unrounded(node, 0) if state.stays_wide(node) else state.given(node, 0)
    x = emitter.cast_once(f"{given.name}_as_{dtype}", given, dtype)
    raw = name if weight.descale is None and dtype == result else f"{name}_raw"
    product = emitter.linear(raw, x, weight.value, bias)
    if weight.descale is not None:
        product = emitter.binary("mul", name, product, weight.descale)
    made = emitter.cast(name, product, result)
    if adding is not None:
        state.hold(adding, made)
    return made


def _bias_of(product: fx.Node) -> fx.Node | None:
    """The bias that alone reads a product, if there is one."""
    users = list(product.users)
    return users[0] if len(users) == 1 and users[0].target is dialect.BIAS else None


def _rows(state: FunctionLowering, node: fx.Node, weight: Weight) -> Value:
    """Emits the table's rows for the tokens."""
    emitter, name = state.emitter, state.name(node)
    wide = state.stays_wide(node)
    kept = weight.descale is None and weight.value.dtype == ("fp32" if wide else "fp16")
    raw = name if kept else f"{name}_raw"
    rows = emitter.gather_rows(raw, weight.value, state.ids)
    if weight.descale is not None:
        factors = emitter.gather_rows(f"{name}_factors", weight.descale, state.ids)
        column = emitter.reshape(f"{name}_factor_column", factors, (*factors.shape, 1))
        rows = emitter.binary("mul", f"{name}_scaled" if wide else name, rows, column)
    return emitter.cast(name, rows, "fp32" if wide else "fp16")


def _embedding(state: FunctionLowering, node: fx.Node) -> Value:
    return _rows(state, node, Weight(state.floating(node)))


def _quant_embedding(state: FunctionLowering, node: fx.Node) -> Value:
    return _rows(state, node, state.quantized(node))


def _linear(state: FunctionLowering, node: fx.Node) -> Value:
    stored = state.floating(node)
    if not state.style.wide:  # a router's weight is float32 in every recipe
        stored = state.emitter.cast_once(f"{stored.name}_half", stored, "fp16")
    return _product(state, node, Weight(stored))


def _quant_linear(state: FunctionLowering, node: fx.Node) -> Value:
    return _product(state, node, state.quantized(node))


def _round_per_tensor(state: FunctionLowering, node: fx.Node) -> Value:
    scale = state.bank.input_scale(state.emitter, state.weight_name(node))
    return state.emitter.round_to_bytes(state.name(node), state.value(node, 0), scale)


def _rms_norm(state: FunctionLowering, node: fx.Node) -> Value:
    epsilon = NormCall.of(node).epsilon
    norm = wide_rms_norm if _reads_wide(state, node) else scaled_rms_norm
    x, weight = _normalised(state, node), state.floating(node)
    return _narrow(state, node, norm(state.emitter, state.name(node), x, weight, epsilon))


def _layer_norm(state: FunctionLowering, node: fx.Node) -> Value:
    call = LayerNormCall.of(node)
    norm = wide_layer_norm if _reads_wide(state, node) else scaled_layer_norm
    weight, bias = (
        None if source is None else state.float_weight(source)
        for source in (call.weight, call.bias)
    )
    x = _normalised(state, node)
    made = norm(state.emitter, state.name(node), x, weight, bias, call.epsilon)
    return _narrow(state, node, made)


def _normalised(state: FunctionLowering, node: fx.Node) -> Value:
    """What a norm reads: a residual stream or a recurrence's result as it is, else float16."""
    return state.given(node, 0) if _reads_wide(state, node) else state.value(node, 0)


def _reads_wide(state: FunctionLowering, node: fx.Node) -> bool:
    """Whether a norm computes in float32."""
    return state.style.wide or state.stays_wide(node_argument(node, 0))


def _l2_norm(state: FunctionLowering, node: fx.Node) -> Value:
    """A norm of a recurrence's queries and keys, in float32 as the recurrence is."""
    epsilon = FactorCall.of(node).number
    x = _in(state, node, True)
    return _narrow(state, node, unit_norm(state.emitter, state.name(node), x, epsilon))


def _narrow(state: FunctionLowering, node: fx.Node, value: Value) -> Value:
    """A result as float16, except where it is a part of a stream that stays float32."""
    if state.stays_wide(node):
        return value
    if value.dtype == "fp32":
        state.hold_unrounded(node, value)
    return state.emitter.cast(state.name(node), value, "fp16")


def _bias(state: FunctionLowering, node: fx.Node) -> Value:
    return _with_vector(state, node, "add")


def _gain(state: FunctionLowering, node: fx.Node) -> Value:
    return _with_vector(state, node, "mul")


def _with_vector(state: FunctionLowering, node: fx.Node, kind: str) -> Value:
    """``x`` and a weight that broadcasts to it."""
    wide, stored = state.stays_wide(node), state.floating(node)
    suffix, dtype = ("wide", "fp32") if wide else ("half", "fp16")
    own = state.emitter.cast_once(f"{stored.name}_{suffix}", stored, dtype)
    return state.emitter.binary(kind, state.name(node), _in(state, node, wide), own)


def _scale(state: FunctionLowering, node: fx.Node) -> Value:
    """Multiplies by a number; for the GPU in float32 where float16 would round the number."""
    factor = FactorCall.of(node).number
    exact = abs(factor) <= float(np.finfo(np.float16).max) and float(np.float16(factor)) == factor
    wide = state.stays_wide(node) or (state.style.wide and not exact)
    return _by_number(state, node, "mul", factor, wide)


def _softcap(state: FunctionLowering, node: fx.Node) -> Value:
    """``cap * tanh(x / cap)``, for the GPU in float32."""
    emitter, name, cap = state.emitter, state.name(node), FactorCall.of(node).number
    x = _in(state, node, state.style.wide)
    divided = emitter.binary("real_div", f"{name}_over_cap", x, cap)
    bent = emitter.unary("tanh", f"{name}_bent", divided)
    last = name if bent.dtype == "fp16" else f"{name}_capped"
    return emitter.cast(name, emitter.binary("mul", last, bent, cap), "fp16")


def _by_number(
    state: FunctionLowering, node: fx.Node, kind: str, number: float, wide: bool
) -> Value:
    name, x = state.name(node), _in(state, node, wide)
    last = name if x.dtype == "fp16" or state.stays_wide(node) else f"{name}_wide"
    return _narrow(state, node, state.emitter.binary(kind, last, x, number))


def _in(state: FunctionLowering, node: fx.Node, wide: bool, index: int = 0) -> Value:
    """What an operator reads, as float32 or as float16."""
    x, dtype = state.given(node, index), "fp32" if wide else "fp16"
    return state.emitter.cast_once(f"{x.name}_as_{dtype}", x, dtype)


def _gelu(state: FunctionLowering, node: fx.Node) -> Value:
    mode = "TANH_APPROXIMATION" if node.args[1] == "tanh" else "EXACT"
    return state.emitter.gelu(state.name(node), state.value(node, 0), mode)


def _clamp(state: FunctionLowering, node: fx.Node) -> Value:
    limit = FactorCall.of(node).number
    return state.emitter.clip(state.name(node), state.value(node, 0), limit)


def _add(state: FunctionLowering, node: fx.Node) -> Value:
    emitter, name = state.emitter, state.name(node)
    if not state.stays_wide(node):
        return emitter.binary("add", name, state.value(node, 0), state.value(node, 1))
    terms = [state.given(node, index) for index in (0, 1)]
    x, y = (emitter.cast_once(f"{term.name}_as_fp32", term, "fp32") for term in terms)
    return emitter.binary("add", name, x, y)


def _mul(state: FunctionLowering, node: fx.Node) -> Value:
    x, y = (_in(state, node, state.stays_wide(node), index) for index in (0, 1))
    return state.emitter.binary("mul", state.name(node), x, y)


def _unary(kind: str) -> Callable[[FunctionLowering, fx.Node], Value]:
    def emit(state: FunctionLowering, node: fx.Node) -> Value:
        return state.emitter.unary(kind, state.name(node), _in(state, node, state.stays_wide(node)))

    return emit


def _view(state: FunctionLowering, node: fx.Node) -> Value:
    x = _in(state, node, state.stays_wide(node))
    return state.emitter.reshape(state.name(node), x, state.dims(node))


def _split(state: FunctionLowering, node: fx.Node) -> Value:
    sizes = SplitCall.of(node).sizes
    names = [f"{state.name(node)}_part_{index}" for index in range(len(sizes))]
    source = state.value(node, 0)
    state.split_results(node, state.emitter.split(names, source, sizes))
    return source


def _last(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.last_position(state.name(node), state.given(node, 0))


HANDLERS: dict[object, Callable[[FunctionLowering, fx.Node], Value]] = {
    dialect.EMBEDDING: _embedding,
    dialect.QUANT_EMBEDDING: _quant_embedding,
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.ROUND_PER_TENSOR: _round_per_tensor,
    dialect.RMS_NORM: _rms_norm,
    dialect.LAYER_NORM: _layer_norm,
    dialect.BIAS: _bias,
    dialect.SCALE: _scale,
    dialect.SOFTCAP: _softcap,
    dialect.CLAMP: _clamp,
    dialect.GELU: _gelu,
    dialect.ADD: _add,
    dialect.MUL: _mul,
    dialect.SILU: _unary("silu"),
    dialect.SIGMOID: _unary("sigmoid"),
    dialect.TANH: _unary("tanh"),
    dialect.RELU: _unary("relu"),
    dialect.EXP: _unary("exp"),
    dialect.SOFTPLUS: _unary("softplus"),
    dialect.GAIN: _gain,
    dialect.L2_NORM: _l2_norm,
    dialect.ROUTE: emit_route,
    dialect.ROUTE_SPARSE_MIXER: emit_sparse_mixer,
    dialect.VIEW: _view,
    dialect.SPLIT: _split,
    dialect.LAST: _last,
}
