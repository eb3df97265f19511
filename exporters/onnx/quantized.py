"""Weights as ONNX initializers: floats, and integers for MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from torch import fx

from exporters.errors import WeightRefused
from exporters.float_columns import ALL
from exporters.onnx.graph import MICROSOFT, GraphBuilder
from exporters.onnx.state import Lowering
from quant.formats.formats import IntBits, IntFormat
from quant.formats.packing import pack_codes, unpack_codes
from quant.program import dialect
from quant.program.calls import QuantizedCall
from quant.program.head import head_of
from quant.program.program import node_argument, shape_of
from quant.store.store import WeightStore

# At 2 bits the kernels also compute blocks of 16 and 256 correctly, but 200 times more slowly.
BLOCK_SIZES: Final[dict[IntBits, tuple[int, ...]]] = {
    2: (32, 64, 128),
    4: (16, 32, 64, 128, 256),
    8: (16, 32, 64, 128, 256),
}
_BIAS_OPERAND: Final = 5
SMALL_HEAD = 1 << 22  # weights; see `accuracy_level`


def block_size(weight: str, format: IntFormat, columns: int) -> int:
    """The kernels' block size for a format: its group size, or with one scale a row a wide block.

    One scale for a row equals the same scale repeated for every block of the row, so that the
    integers and the scale are still those of the store.

    Args:
        weight: the weight's name, for messages.
        format: the weight's format.
        columns: the number of input columns.

    Raises:
        ExportError: the kernels do not have the format's number of bits, or none of their block
            sizes fits.
    """
    if format.bits not in BLOCK_SIZES:
        near = next(bits for bits in BLOCK_SIZES if bits > format.bits)
        raise WeightRefused(
            f"{weight} is to be {format.name}; ONNX Runtime's kernels have integers of 2, 4 and 8 "
            f"bits",
            f"use {replace(format, bits=near).name}",
        )
    sizes = BLOCK_SIZES[format.bits]
    fast = " fast" if format.bits == 2 else ""
    if format.group_size is not None:
        if format.group_size not in sizes:
            raise WeightRefused(
                f"{weight} has groups of {format.group_size}; ONNX Runtime's{fast} kernels have "
                f"blocks of {', '.join(map(str, sizes))}",
                "choose one of these",
            )
        return format.group_size
    fitting = [size for size in sizes if columns % size == 0]
    if not fitting:
        raise WeightRefused(
            f"{weight} has {columns} input columns; ONNX Runtime's{fast} kernels need a multiple "
            f"of {sizes[0]} for {format.name}",
            "keep it fp16",
        )
    return min(fitting[-1], 128)  # the fast kernels were written for blocks of up to 128


def emit_linear(state: Lowering, node: fx.Node) -> None:
    """Emits a product by MatMulNBits; columns that stay float32 are multiplied apart and added.

    Given::

        %y = edgeforge::quant_linear(%x, %codes, %scale, %zero, "int4-g32")

    Result, where the weight has such columns (`exporters.float_columns`)::

        %f = MatMul(Gather(%x, columns), their_values)
        %r = MatMulNBits(Mul(%x, rounded), %codes, %scale, %zero)   # 0 in these columns, else 1
        %y = Add(%r, %f)

    A bias that follows is an operand of MatMulNBits.
    """
    weight, format = weight_of(state, node)
    rows, columns = matrix_of(node, format)
    kept = state.float_columns.get(weight, ())
    level = accuracy_level(node is head_of(state.program), rows * columns, format.bits)
    if kept == ALL:
        level = 1
    if level == 1:
        kept = ALL
    bias = bias_within(node)
    whole = state.name(bias[0] if bias else node)
    source, result, added = state.operand(node, 0), whole, ""
    if kept:
        state.kept[weight] = kept
    if kept and kept != ALL:
        source, added = _apart(state, weight, format, columns, kept, source, result)
        result = f"{result}_rounded"
    block = block_size(weight, format, columns)
    codes = state.store.extents(weight)["codes"]
    packed = state.builder.stored(
        f"{weight}.blocks",
        codes,
        (rows, columns // block, block * format.bits // 8),
        (weight, "codes"),
    )
    operands = [
        source,
        packed,
        scale_of(state.builder, state.store, weight, format, columns // block),
        *_zero_point(state.builder, state.store, weight, format, columns // block),
    ]
    if bias:
        absent = [""] * (_BIAS_OPERAND - len(operands))
        operands += [*absent, float_weight(state, node_argument(bias[0], 1))]
    state.builder.node(
        "MatMulNBits",
        operands,
        result,
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=format.bits,
        block_size=block,
        accuracy_level=level,
    )
    if added:
        state.builder.node("Add", [result, added], whole)


def bias_within(node: fx.Node) -> tuple[fx.Node, ...]:
    """The bias that MatMulNBits adds within a product of integers; empty where there is none.

    A product of rounded activations goes through QGemm, whose bias is of integers.
    """
    users = tuple(node.users)
    if node.target is not dialect.QUANT_LINEAR or len(users) != 1:
        return ()
    if node_argument(node, 0).target in dialect.ROUNDINGS:
        return ()
    return users if users[0].target is dialect.BIAS else ()


def _apart(
    state: Lowering,
    weight: str,
    format: IntFormat,
    columns: int,
    kept: tuple[int, ...],
    source: str,
    result: str,
) -> tuple[str, str]:
    """Emits the part of a product that stays float32; returns what is left of ``x``, and the part.

    Args:
        state: the graph being lowered.
        weight: the weight's name.
        format: the weight's format.
        columns: the number of the weight's columns.
        kept: the columns whose activations stay float32.
        source: the name of ``x``.
        result: the name of the whole product, from which the new values are named.
    """
    builder = state.builder
    rounded = np.ones(columns, np.float32)
    rounded[list(kept)] = 0
    indices = builder.constant(f"{weight}.float_columns", np.array(kept, np.int64))
    builder.node("Gather", [source, indices], f"{result}_large", axis=-1)
    factor = _column_values(state, weight, format, kept)
    builder.node("MatMul", [f"{result}_large", factor], f"{result}_exact")
    mask = builder.table(f"{weight}.rounded_columns", rounded)
    builder.node("Mul", [source, mask], f"{result}_rest")
    return f"{result}_rest", f"{result}_exact"


def _column_values(state: Lowering, weight: str, format: IntFormat, kept: tuple[int, ...]) -> str:
    """Emits the values of a few columns as float32[columns, rows]; returns their name.

    They are computed from the stored integers and scales, so that the file holds no weight twice.
    The runtime computes them once, on loading the model, because nothing here depends on an input.
    """
    builder, name = state.builder, f"{weight}.float_values"
    codes = state.store.extents(weight)["codes"]
    rows = builder.stored(f"{weight}.rows", codes, codes.shape, (weight, "codes"))
    per_byte = 8 // format.bits
    where = np.array(kept, np.int64)

    def constant(part: str, values: npt.NDArray[np.generic]) -> str:
        return builder.constant(f"{name}_{part}", values)

    def step(op: str, part: str, *inputs: str, **attributes: int | str | list[int]) -> str:
        return builder.node(op, list(inputs), f"{name}_{part}", domain="", **attributes)

    def picked(source: str, part: str, places: npt.NDArray[np.int64]) -> str:
        """The codes at these places of each row, each in a byte of its own, as float32."""
        taken = step(
            "Gather", f"{part}_bytes", source, constant(f"{part}_at", places // per_byte), axis=1
        )
        if per_byte > 1:
            shifts = (places % per_byte * format.bits).astype(np.uint8)
            taken = step(
                "BitShift",
                f"{part}_low",
                taken,
                constant(f"{part}_shifts", shifts),
                direction="RIGHT",
            )
            most = np.array(format.max_code, np.uint8)
            taken = step("BitwiseAnd", part, taken, constant(f"{part}_mask", most))
        return step("Cast", f"{part}_float", taken, to=TensorProto.FLOAT)

    groups = np.zeros_like(where) if format.group_size is None else where // format.group_size
    zero = constant("zero", np.array(format.implicit_zero_point, np.float32))
    if not format.symmetric:
        extent = state.store.extents(weight)["zero_point"]
        stored = builder.stored(f"{weight}.zero", extent, extent.shape, (weight, "zero_point"))
        zero = picked(stored, "zeros", groups)
    steps = step("Sub", "steps", picked(rows, "codes", where), zero)
    scale = scale_of(builder, state.store, weight, format, 1)
    scales = step("Gather", "scales", scale, constant("groups", groups), axis=1)
    values = step("Mul", "rows", steps, scales)
    return step("Transpose", "columns", values, perm=[1, 0])


def accuracy_level(is_head: bool, weights: int, bits: int) -> int:
    """MatMulNBits' ``accuracy_level``: 4 rounds activations to 8 bits, 1 keeps them float32.

    Level 4 is two to three times as fast. A head of at most `SMALL_HEAD` weights gets level 1: it
    fits into a core's cache, so that the difference is microseconds a token, and the rounding of
    level 4 would go straight into the logits, where it decides between near ties. At 2 bits level 1
    is a hundred times as slow, so it is not used there.

    Args:
        is_head: whether the product gives the logits.
        weights: the number of weights of the matrix.
        bits: the number of bits of each integer.
    """
    return 1 if is_head and weights <= SMALL_HEAD and bits > 2 else 4


def emit_embedding(state: Lowering, node: fx.Node) -> None:
    """Emits GatherBlockQuantized; a tied head reads the same bytes of the weight file."""
    weight, format = weight_of(state, node)
    _, columns = matrix_of(node, format)
    block = block_size(weight, format, columns)
    codes = state.store.extents(weight)["codes"]
    table = state.builder.stored(f"{weight}.rows", codes, codes.shape, (weight, "codes"))
    state.builder.node(
        "GatherBlockQuantized",
        [
            table,
            "input_ids",
            scale_of(state.builder, state.store, weight, format, columns // block),
            *_zero_point(state.builder, state.store, weight, format, columns // block),
        ],
        state.name(node),
        domain=MICROSOFT,
        bits=format.bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )


def float_weight(state: Lowering, placeholder: fx.Node, as_table: bool = False) -> str:
    """Returns the name of the float32 value that holds a weight which stays float.

    Args:
        state: the graph being lowered.
        placeholder: the program's placeholder for the weight.
        as_table: whether to return the initializer in its stored dtype instead, for a gather
            whose few rows are cast after it.
    """
    weight = state.program.inputs[placeholder.name].name
    extent = state.store.extents(weight)["value"]
    shape = shape_of(placeholder)
    if as_table:
        return state.builder.stored(f"{weight}.rows", extent, shape, (weight, "value"))
    if extent.dtype == "F32":
        return state.builder.stored(weight, extent, shape, (weight, "value"))
    narrow = state.builder.stored(f"{weight}.stored", extent, shape, (weight, "value"))
    return cast_once(state.builder, narrow, weight)


def cast_once(builder: GraphBuilder, source: str, target: str) -> str:
    """Casts a narrower initializer to float32; the runtime does so once, on loading the model."""
    if not builder.has(target):
        builder.node("Cast", [source], target, to=TensorProto.FLOAT)
    return target


def scale_of(
    builder: GraphBuilder, store: WeightStore, weight: str, format: IntFormat, blocks: int
) -> str:
    """Returns the scales as float32[rows, blocks]; the file holds them as bfloat16 or float16."""
    extent = store.extents(weight)["scale"]
    name = f"{weight}.scale_{extent.dtype.lower()}"
    stored = builder.stored(name, extent, extent.shape, (weight, "scale"))
    scale = cast_once(builder, stored, f"{weight}.scale")
    if format.group_size is not None or blocks == 1:
        return scale
    repeated = f"{weight}.scale_blocks"
    if not builder.has(repeated):
        shape = np.array([extent.shape[0], blocks], np.int64)
        builder.node("Expand", [scale, builder.constant(f"{repeated}_shape", shape)], repeated)
    return repeated


def _zero_point(
    builder: GraphBuilder, store: WeightStore, weight: str, format: IntFormat, blocks: int
) -> list[str]:
    if format.symmetric:
        return []
    extent = store.extents(weight)["zero_point"]
    if format.group_size is not None or blocks == 1:
        return [builder.stored(f"{weight}.zero", extent, extent.shape, (weight, "zero_point"))]
    one = unpack_codes(store.part(weight, "zero_point"), format, 1)
    packed = pack_codes(one.expand(extent.shape[0], blocks), format)
    return [builder.table(f"{weight}.zero_{format.bits}x{blocks}", packed.numpy())]


def weight_of(state: Lowering, node: fx.Node) -> tuple[str, IntFormat]:
    """The name and the format of the weight that a quantized operator reads."""
    call = QuantizedCall.of(node)
    return state.program.inputs[call.codes.name].name, call.integers


def matrix_of(node: fx.Node, format: IntFormat) -> tuple[int, int]:
    """The rows and columns of the matrix that a quantized operator reads."""
    return QuantizedCall.of(node).shape
