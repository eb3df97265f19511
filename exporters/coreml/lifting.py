"""Goes through a function's operations and lifts them: one handler for each that matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from exporters.coreml import (
    lifted_adapters,
    lifted_attention,
    lifted_convolution,
    lifted_marks,
    lifted_memory,
    lifted_mixtures,
    lifted_norms,
    lifted_recurrence,
    lifted_slots,
)
from exporters.coreml.emitted import EMITTED, MAY_BE_FLOAT32
from exporters.coreml.lifted_pieces import PIECES
from exporters.coreml.lifted_routes import logits_of
from exporters.coreml.lifted_values import (
    Held,
    Operations,
    Part,
    Updated,
    Walk,
    computed,
    function_operand,
    number,
    operands,
    probes_of_function,
)
from exporters.coreml.names import LOGITS, POSITION, TOKENS
from exporters.coreml.package import Package
from exporters.errors import ExportError
from exporters.lifted import (
    Array,
    Bias,
    Clamp,
    Constant,
    Embedding,
    EntryPoint,
    Gelu,
    LayerNorm,
    Linear,
    Numbers,
    Precision,
    Product,
    Scaled,
    Sigmoid,
    Silu,
    Softcap,
    StoredWeight,
    Sum,
    Tokens,
    Unknown,
    Value,
)
from exporters.lifted_recurrent import (
    Function,
    FunctionName,
    Gain,
)

Given = Mapping[str, tuple[Value, ...]]


def lift_function(
    package: Package, name: str, context: int, constants: dict[object, Array]
) -> EntryPoint:
    """Goes through the operations of a function in order.

    Args:
        package: the package.
        name: the function's name.
        context: the declared context, tokens.
        constants: arrays that were read already; functions share them.

    Raises:
        ExportError: the function has no logits, or a constant cannot be read.
    """
    operations = Operations(package, name, constants)
    walk = Walk(operations, probes_of_function(package, name, context))
    walk.factors.update(operations.weights_with_factors())
    for given in package.function(name).inputs:
        _take_input(walk, str(given.name), given.type)
    _lift_block(walk, operations.block)
    if LOGITS not in walk.values:
        raise ExportError(f"{package.path}: {name} has no output {LOGITS}")
    return EntryPoint(name, walk.values[LOGITS], walk.probes, tuple(walk.outside))


def _lift_block(walk: Walk, block: Any) -> None:
    for operation in block.operations:
        for inner in operation.blocks:
            _lift_block(walk, inner)
        for output, value in zip(operation.outputs, _lifted(walk, operation), strict=False):
            walk.values[str(output.name)] = value


def _take_input(walk: Walk, name: str, kind: Any) -> None:
    walk.operations.note(name, kind)
    if name == TOKENS:
        walk.values[name] = Tokens(name)
    elif name == POSITION:
        starts = tuple(np.array([probe.start], np.int64) for probe in walk.probes)
        walk.values[name] = Numbers(name, starts)
    else:
        walk.states[name] = walk.values[name] = Held(name, name)


def _lifted(walk: Walk, operation: Any) -> tuple[Value, ...]:
    kind = str(operation.type)
    name = str(operation.outputs[0].name) if operation.outputs else kind
    if kind not in EMITTED:
        walk.outside.append(f"{kind} at {name}")
    if kind == "const":
        return (walk.operations.lifted_constant(operation),)
    if kind.startswith("constexpr_"):
        return (walk.operations.unpacked(operation),)
    given = {
        str(key): tuple(
            walk.values.get(str(binding.name), Unknown(str(binding.name), "absent"))
            for binding in operation.inputs[key].arguments
        )
        for key in sorted(operation.inputs)
    }
    numbers = computed(kind, name, given, walk.probes)
    if numbers is not None:
        return (numbers,)
    made = HANDLERS[kind](walk, name, given, operation) if kind in HANDLERS else None
    if made is None:
        flat = tuple(value for values in given.values() for value in values)
        made = tuple(Unknown(str(each.name), kind, flat) for each in operation.outputs)
    _check_precision(walk, kind, name, made)
    return made


def _check_precision(walk: Walk, kind: str, name: str, made: tuple[Value, ...]) -> None:
    if walk.operations.dtypes.get(name) != "fp32" or kind in MAY_BE_FLOAT32:
        return
    product = made[0] if made else None
    if kind == "softmax" and product is not None:
        product = logits_of(product)
    if product is not None and lifted_adapters.is_by_factor(product):
        return
    if kind == "matmul" and isinstance(product, Unknown) and product.kind == "matmul":
        return  # of a recurrence; attention's are known as such
    if isinstance(product, Unknown) and product.operands:
        product = product.operands[0]
    if isinstance(product, Bias):
        product = product.source
    if isinstance(product, Linear) and product.weight.format.kind in ("fp32", "bf16"):
        return
    walk.outside.append(f"{kind} in float32 at {name}")


Made = tuple[Value, ...] | None


def _shape(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    if not isinstance(given["x"][0], Tokens):
        return None
    return (Numbers(name, tuple(np.array([1, probe.count]) for probe in walk.probes)),)


def _gather(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    table, rows = given["x"][0], given["indices"][0]
    if isinstance(table, Constant) and isinstance(rows, Numbers):
        return lifted_attention.table_rows(walk, name, table, rows)
    if not (isinstance(table, Part) and isinstance(rows, Tokens)):
        return None
    if table.part == "descale":
        return (table,)
    found = Embedding(name, table.weight)
    return (_unscaled(walk, name, table.weight, found),)


def _unscaled(walk: Walk, name: str, weight: StoredWeight, value: Value) -> Value:
    """A result that the rows' factors are still to be applied to, where the weight has such."""
    if weight.name not in walk.factors:
        return value
    return Unknown(name, "rows without their factors", (value,))


def _linear(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    source, weight = given["x"][0], given["weight"][0]
    if not isinstance(weight, Part) or weight.part != "value" or "bias" not in given:
        return None
    bias = given["bias"][0]
    added = isinstance(bias, Part) and bias.values is not None
    if not added and (not isinstance(bias, Constant) or np.any(bias.array)):
        return None
    half = walk.operations.dtypes.get(name) == "fp16"
    precision: Precision = "float16" if half else "float32"
    if isinstance(source, Unknown) and source.kind == "int8-tensor":
        scale, x = source.operands
        if isinstance(scale, Part) and scale.weight.name == weight.weight.name:
            source, precision = x, "int8-tensor"
    found = _unscaled(walk, name, weight.weight, Linear(name, source, weight.weight, precision))
    if isinstance(bias, Part) and bias.values is not None:
        return (Bias(name, found, bias.weight, bias.values),)
    return (found,)


def _quantize(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    return (Unknown(name, "codes", (given["scale"][0], given["input"][0])),)


def _dequantize(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    codes, scale = given["input"][0], given["scale"][0]
    if isinstance(codes, Unknown) and codes.kind == "codes" and codes.operands[0] is scale:
        return (Unknown(name, "int8-tensor", codes.operands),)
    return None


def _mul(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    pair = given["x"][0], given["y"][0]
    for one, other in (pair, pair[::-1]):
        if isinstance(other, Part) and other.part == "descale" and isinstance(one, Unknown):
            inner = one.operands[0] if one.operands else one
            own = isinstance(inner, Linear | Embedding) and inner.weight.name == other.weight.name
            return (inner,) if own else None
        if isinstance(other, Part):
            norm: Value | None = lifted_norms.norm_of(name, one, other)
            if isinstance(one, LayerNorm) and _as_wide(walk, one, other):
                norm = lifted_norms.scaled_by(name, one, other)
            if norm is None and other.values is not None and not isinstance(one, Numbers | Part):
                norm = Gain(name, one, other.weight, other.values)
            if norm is not None:
                return (norm,)
    found = lifted_attention.scaled_rows(name, pair)
    found = found or lifted_attention.placed_by(walk, name, pair)
    if found is not None:
        return found
    for one, other in (pair, pair[::-1]):
        factor = number(other)
        if factor is not None:
            return (_by_number(name, one, factor),)
    norm = lifted_norms.layer_norm_of(name, pair) or lifted_norms.unit_norm_of(name, pair)
    return (Product(name, pair) if norm is None else norm,)


def _as_wide(walk: Walk, norm: LayerNorm, part: Part) -> bool:
    """Whether a weight is as wide as what a norm normalises, which may be a head of several."""
    return part.values is not None and walk.shape(norm)[-1:] == (part.values.size,)


def _by_number(name: str, source: Value, factor: float) -> Value:
    """A value times a number: a softcap where it is a tanh of a quotient by the same number."""
    bent = function_operand(source, "tanh")
    divided = None if bent is None else operands(bent, "real_div")
    if divided is not None and number(divided[1]) == factor:
        return Softcap(name, divided[0], factor)
    return Scaled(name, source, factor)


def _add(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    pair = tuple(lifted_convolution.previous(walk, given[key][0]) for key in ("x", "y"))
    assert len(pair) == 2
    rope = lifted_attention.rotated(name, pair)
    if rope is not None:
        return (rope,)
    for one, other in (pair, pair[::-1]):
        if isinstance(other, Part) and other.values is not None:
            if isinstance(one, LayerNorm) and _as_wide(walk, one, other):
                shifted = lifted_norms.shifted_by(name, one, other)
                return None if shifted is None else (shifted,)
            return (Bias(name, one, other.weight, other.values),)
    found: Value | None = lifted_adapters.adapted(pair)
    found = found or lifted_mixtures.added(name, pair)
    found = found or lifted_attention.one_hot_update(walk, name, pair)
    found = found or lifted_convolution.convolution(walk, name, pair)
    return (Sum(name, pair) if found is None else found,)


def _silu(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    return (Silu(name, given["x"][0]),)


def _function(function: FunctionName) -> Callable[[Walk, str, Given, Any], Made]:
    def lift(walk: Walk, name: str, given: Given, operation: Any) -> Made:
        return (Function(name, given["x"][0], function),)

    return lift


def _sigmoid(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    return (Sigmoid(name, given["x"][0]),)


def _gelu(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    forms = {"EXACT": False, "TANH_APPROXIMATION": True}
    form = forms.get(given["mode"][0].name)
    return None if form is None else (Gelu(name, given["x"][0], form),)


def _clip(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    low, high = (number(given[key][0]) for key in ("alpha", "beta"))
    if low is None or high is None or low != -high:
        return None
    return (Clamp(name, given["x"][0], high),)


def _read_state(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    source = given["input"][0]
    return (walk.states.get(source.name, source),)


def _write_state(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    state, data = given["input"][0], given["data"][0]
    if isinstance(data, Updated):
        data = Updated(data.name, data.old, data.new, data.rows, state.name)
    lifted_convolution.kept(walk, state.name, data)
    lifted_recurrence.written(walk, state.name, data)
    walk.states[state.name] = data
    return ()


def _select(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    return (
        lifted_convolution.select(walk, name, given)
        or lifted_memory.select(walk, name, given)
        or lifted_slots.select(walk, name, given, operation)
        or lifted_mixtures.kept(name, given)
    )


def _slice_update(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    return lifted_attention.slice_update(walk, name, given)


def _attention(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    return lifted_attention.fused(walk, name, given)


def _matmul(walk: Walk, name: str, given: Given, operation: Any) -> Made:
    return lifted_attention.mixed(walk, name, given)


HANDLERS: Final[Mapping[str, Callable[[Walk, str, Given, Any], Made]]] = {
    **PIECES,
    "shape": _shape,
    "gather": _gather,
    "linear": _linear,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "mul": _mul,
    "add": _add,
    "silu": _silu,
    "tanh": _function("tanh"),
    "relu": _function("relu"),
    "exp": _function("exp"),
    "softplus": _function("softplus"),
    "sub": lifted_memory.rest,
    "gelu": _gelu,
    "clip": _clip,
    "select": _select,
    "read_state": _read_state,
    "write_state": _write_state,
    "slice_update": _slice_update,
    "scaled_dot_product_attention": _attention,
    "matmul": _matmul,
    "sigmoid": _sigmoid,
    "not_equal": lifted_marks.marks,
    "reduce_max": lifted_marks.used,
    "greater": lifted_marks.above_zero,
    "fill_like": lifted_marks.zeros,
    "tile": lifted_marks.tiled,
    "cumsum": lifted_slots.counted,
    "equal": lifted_slots.own,
    "reduce_sum": lifted_slots.summed,
    "cond": lifted_mixtures.cond,
}
