"""Products of 8-bit activations with 8-bit weights in integer arithmetic, by QGemm.

Activations and weights are unsigned here; weights keep the store's codes, whose zero is 128. On
processors with AVX2 and without VNNI, the kernels for signed weights add pairs of products in 16
bits, which overflows; on arm64 both kinds are equally fast.

QGemm takes one scale and one zero point for all activations. Scales and zero points of single
tokens are therefore applied outside it: ``sum((a - z) b) = sum(a b) - z sum(b)`` in integers, and
then each token's step multiplies its results. DynamicQuantizeMatMul would give all tokens of a run
one scale, so that a token's result would depend on the other tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from torch import fx

from exporters.errors import WeightRefused
from exporters.onnx.graph import MICROSOFT, GraphBuilder
from exporters.onnx.quantized import cast_once, matrix_of, scale_of, weight_of
from exporters.onnx.state import Lowering
from quant.formats.activations import INPUT_SCALE, NONE
from quant.formats.formats import IntFormat
from quant.plans.plan import QuantPlan
from quant.program.ops import SMALLEST_STEP
from quant.program.program import node_argument, shape_of
from quant.store.store import WeightStore

_ROWS = IntFormat(8, None)
_CHUNK = 1 << 20


def check_rounded(plan: QuantPlan) -> None:
    """Refuses rounded activations where the integer product does not take the weight's format.

    Raises:
        ExportError: names the weight, and the format or activation to use instead.
    """
    for weight, assignment in plan.weights.items():
        if assignment.activation != NONE and assignment.format != _ROWS:
            raise WeightRefused(
                f"{weight} is to be {assignment.format.name} with activation "
                f"{assignment.activation}; ONNX Runtime multiplies rounded activations by 8-bit "
                f"weights with one scale a row",
                f"use {_ROWS.name}, or activation none",
            )


def emit_per_token(state: Lowering, node: fx.Node) -> None:
    """Emits the rounding of activations to 8 bits with one step and one zero point a token.

    With ``NAME`` for the node's ONNX name, the values are ``NAME``, the codes
    ``uint8[tokens, columns]``; ``NAME_step``, ``float32[tokens, 1]``; and ``NAME_zero``,
    ``int32[tokens, 1]``.
    """
    builder, name = state.builder, state.name(node)
    rows = _as_rows(state, node)
    last = builder.integers("axis_1", [1])

    def number(label: str, value: float) -> str:
        return builder.constant(f"float_{label}", np.array(value, np.float32))

    zero = number("zero", 0)
    builder.node("ReduceMax", [rows, last], f"{name}_highest", keepdims=0)
    builder.node("ReduceMin", [rows, last], f"{name}_lowest", keepdims=0)
    builder.node("Max", [f"{name}_highest", zero], f"{name}_high")
    builder.node("Min", [f"{name}_lowest", zero], f"{name}_low")
    builder.node("Sub", [f"{name}_high", f"{name}_low"], f"{name}_range")
    builder.node("Div", [f"{name}_range", number("steps_of_8_bits", 255)], f"{name}_plain_step")
    smallest = number("smallest_step", SMALLEST_STEP)
    builder.node("Max", [f"{name}_plain_step", smallest], f"{name}_steps")
    builder.node("Div", [f"{name}_low", f"{name}_steps"], f"{name}_minus_zeros")
    builder.node("Neg", [f"{name}_minus_zeros"], f"{name}_plain_zeros")
    builder.node("Round", [f"{name}_plain_zeros"], f"{name}_zeros")
    builder.node("Cast", [f"{name}_zeros"], f"{name}_byte_zeros", to=TensorProto.UINT8)
    builder.node("Cast", [f"{name}_zeros"], f"{name}_wide_zeros", to=TensorProto.INT32)
    codes = [rows, f"{name}_steps", f"{name}_byte_zeros"]
    builder.node("QuantizeLinear", codes, name, axis=0)
    builder.node("Unsqueeze", [f"{name}_steps", last], f"{name}_step")
    builder.node("Unsqueeze", [f"{name}_wide_zeros", last], f"{name}_zero")


def emit_per_tensor(state: Lowering, node: fx.Node) -> None:
    """Emits the rounding by the stored scale: codes ``uint8[tokens, columns]``, 128 for zero."""
    builder, name = state.builder, state.name(node)
    weight = state.program.inputs[node_argument(node, 1).name].name
    extent = state.store.extents(weight)[INPUT_SCALE]
    stored = builder.stored(f"{weight}.input_scale_bf16", extent, (), (weight, INPUT_SCALE))
    scale = cast_once(builder, stored, f"{weight}.input_scale")
    codes = [_as_rows(state, node), scale, _byte(builder, 128)]
    builder.node("QuantizeLinear", codes, name)


def emit_per_token_linear(state: Lowering, node: fx.Node) -> None:
    """Emits a product with activations that `emit_per_token` rounded."""
    builder, name, codes = state.builder, state.name(node), state.operand(node, 0)
    weight, _ = weight_of(state, node)
    sums = builder.table(f"{weight}.minus_row_sums", -row_sums(state.store, weight))
    builder.node("Mul", [f"{codes}_zero", sums], f"{name}_correction")
    one = builder.constant("float_one", np.array(1, np.float32))
    left = codes, one, _byte(builder, 0)
    _product(state, node, left, f"{name}_unscaled", [f"{name}_correction"])
    builder.node("Mul", [f"{name}_unscaled", f"{codes}_step"], f"{name}_rows")
    _from_rows(state, node)


def emit_per_tensor_linear(state: Lowering, node: fx.Node) -> None:
    """Emits a product with activations that `emit_per_tensor` rounded."""
    weight, _ = weight_of(state, node)
    left = state.operand(node, 0), f"{weight}.input_scale", _byte(state.builder, 128)
    _product(state, node, left, f"{state.name(node)}_rows", [])
    _from_rows(state, node)


def row_sums(store: WeightStore, weight: str) -> npt.NDArray[np.int32]:
    """The sum of each row's integers, ``int32[rows]``; it reads a few rows at a time."""
    codes = store.part(weight, "codes").numpy()
    rows, columns = codes.shape
    step = max(1, _CHUNK // columns)
    parts = [codes[at : at + step].sum(1, dtype=np.int32) for at in range(0, rows, step)]
    store.release()  # otherwise the pages read here would count as this process's memory
    return (np.concatenate(parts) - np.int32(128 * columns)).astype(np.int32)


def _product(
    state: Lowering, node: fx.Node, left: tuple[str, str, str], result: str, more: list[str]
) -> None:
    """Emits QGemm with float32 results.

    Args:
        state: the graph being lowered.
        node: the product.
        left: the activations' codes, scale and zero point.
        result: the name of the result.
        more: further operands of QGemm: the matrix to add, or none.
    """
    builder = state.builder
    weight, format = weight_of(state, node)
    rows, columns = matrix_of(node, format)
    codes = builder.stored(
        f"{weight}.rows",
        state.store.extents(weight)["codes"],
        (rows, columns),
        (weight, "codes"),
    )
    scale = f"{weight}.row_scale"
    if not builder.has(scale):
        plain = scale_of(builder, state.store, weight, format, 1)
        builder.node("Reshape", [plain, builder.integers("any_number", [-1])], scale)
    points = builder.table(f"zero_points_{rows}", np.full(rows, 128, np.uint8))
    inputs = [*left, codes, scale, points, *more]
    builder.node("QGemm", inputs, result, domain=MICROSOFT, transA=0, transB=1, alpha=1.0)


def _as_rows(state: Lowering, node: fx.Node) -> str:
    """Reshapes the operand of a rounding to ``[tokens, columns]``, which QGemm needs."""
    columns = shape_of(node)[-1]
    shape = state.builder.integers(f"rows_of_{columns}", [-1, columns])
    source = [state.operand(node, 0), shape]
    return state.builder.node("Reshape", source, f"{state.name(node)}_input")


def _from_rows(state: Lowering, node: fx.Node) -> None:
    """Reshapes a product's ``[tokens, rows]`` to the program's ``[batch, t, rows]``.

    In a branch of a mixture the rows of the tokens that chose it are the program's value.
    """
    if node in state.in_branches:
        state.names[node] = f"{state.name(node)}_rows"
        return
    builder, (_, tokens, rows) = state.builder, shape_of(node)
    if tokens != -1:
        shape = builder.integers(f"{tokens}_by_{rows}", [-1, tokens, rows])
    else:
        shape = f"tokens_by_{rows}"
        if not builder.has("tokens_shape"):
            builder.node("Shape", ["input_ids"], "tokens_shape")
        if not builder.has(shape):
            width = builder.integers(f"width_{rows}", [rows])
            builder.node("Concat", ["tokens_shape", width], shape, axis=0)
    builder.node("Reshape", [f"{state.name(node)}_rows", shape], state.name(node))


def _byte(builder: GraphBuilder, value: int) -> str:
    return builder.constant(f"byte_{value}", np.array(value, np.uint8))
