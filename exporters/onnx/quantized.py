"""Weights as ONNX initializers: floats, and integers for MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from onnx import TensorProto
from torch import fx

from exporters.errors import WeightRefused
from exporters.onnx.graph import MICROSOFT, GraphBuilder
from exporters.onnx.state import Lowering
from quant.formats.formats import IntBits, IntFormat
from quant.formats.packing import pack_codes, unpack_codes
from quant.program.calls import QuantizedCall
from quant.program.program import shape_of
from quant.store.store import WeightStore

# At 2 bits the kernels also compute blocks of 16 and 256 correctly, but 200 times more slowly.
BLOCK_SIZES: Final[dict[IntBits, tuple[int, ...]]] = {
    2: (32, 64, 128),
    4: (16, 32, 64, 128, 256),
    8: (16, 32, 64, 128, 256),
}
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
    """Emits MatMulNBits, with float32 operand and result; `accuracy_level` sets its arithmetic."""
    weight, format = weight_of(state, node)
    rows, columns = matrix_of(node, format)
    block = block_size(weight, format, columns)
    codes = state.store.extents(weight)["codes"]
    packed = state.builder.stored(
        f"{weight}.blocks",
        codes,
        (rows, columns // block, block * format.bits // 8),
        (weight, "codes"),
    )
    state.builder.node(
        "MatMulNBits",
        [
            state.operand(node, 0),
            packed,
            scale_of(state.builder, state.store, weight, format, columns // block),
            *_zero_point(state.builder, state.store, weight, format, columns // block),
        ],
        state.name(node),
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=format.bits,
        block_size=block,
        accuracy_level=accuracy_level(node is state.program.output(), rows * columns, format.bits),
    )


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
