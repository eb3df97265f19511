"""Quantized weights in a module's ONNX graph: the store's own bytes, read by three kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from torch import fx

from exporters.errors import WeightRefused
from exporters.onnx.graph import MICROSOFT
from exporters.onnx.quantized import block_size, scale_of
from quant.formats.formats import IntFormat

if TYPE_CHECKING:
    from exporters.modules.onnx.state import State
    from quant.store.store import WeightStore


def dequantized(state: State, weight: str) -> str:
    """Emits a weight's float values from its stored integers; returns their name.

    Formats are symmetric: `edgeforge.modules.plan` refuses others.

    Result::

        %w = DequantizeLinear(codes, Cast(scale), zero_point)   # [shape of the parameter]
    """
    store, format = _quantized(state, weight)
    shape = state.request.traced.weights[weight].shape
    rows, columns = state.request.traced.weights[weight].matrix
    extent = store.extents(weight)["codes"]
    element = TensorProto.UINT8 if format.bits == 8 else TensorProto.UINT4
    matrix = state.builder.stored(
        f"{weight}.codes", extent, (rows, columns), (weight, "codes"), element=element
    )
    groups = 1 if format.group_size is None else columns // format.group_size
    scale = scale_of(state.builder, store, weight, format, groups)
    if groups == 1:
        scale = state.emit("Reshape", [scale, state.integers([rows])])
    zero = _zero(state, weight, format, (rows,) if groups == 1 else (rows, groups))
    attributes = {"axis": 0} if groups == 1 else {"axis": 1, "block_size": format.group_size}
    wide = state.emit("DequantizeLinear", [matrix, scale, zero], f"{weight}.values", **attributes)
    return wide if len(shape) == 2 else state.emit("Reshape", [wide, state.integers(shape)])


def _zero(state: State, weight: str, format: IntFormat, shape: tuple[int, ...]) -> str:
    """The zero points as ``DequantizeLinear`` takes them: one for each scale, all equal."""
    half, count = format.implicit_zero_point, int(np.prod(shape))
    if format.bits == 8:
        return state.builder.table(f"{weight}.zero", np.full(shape, half, np.uint8))
    packed = np.full((count + 1) // 2, half | half << 4, np.uint8).tobytes()
    return state.builder.raw(f"{weight}.zero", TensorProto.UINT4, shape, packed)


def emit_linear(state: State, node: fx.Node) -> None:
    """Emits ``aten::linear``: MatMulNBits for a quantized weight, else FusedMatMul and Add."""
    source, matrix = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(matrix, fx.Node)
    weight = state.parameters.get(matrix, "")
    block = _block(state, weight)
    if block:
        absent = "", ""  # no zero points, no order of columns
        added = [] if bias is None else [*absent, state.value(bias)]
        rows, columns = state.request.traced.weights[weight].matrix
        _, format = _quantized(state, weight)
        state.names[node] = state.emit(
            "MatMulNBits",
            [state.value(source), *_packed(state, weight, block), *added],
            node.name,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=format.bits,
            block_size=block,
            accuracy_level=4,
        )
        return
    product = state.emit(
        "FusedMatMul",
        [state.value(source), state.value(matrix)],
        node.name,
        domain=MICROSOFT,
        transA=0,
        transB=1,
        alpha=1.0,
    )
    state.names[node] = (
        product if bias is None else state.emit("Add", [product, state.value(bias)], node.name)
    )


def emit_embedding(state: State, node: fx.Node) -> None:
    """Emits ``aten::embedding``: GatherBlockQuantized for a quantized table, else Gather."""
    table, indices = node.args[:2]
    assert isinstance(table, fx.Node)
    weight = state.parameters.get(table, "")
    block = _block(state, weight)
    if not block:
        state.names[node] = state.emit("Gather", [state.value(table), state.value(indices)], axis=0)
        return
    store, format = _quantized(state, weight)
    codes = store.extents(weight)["codes"]
    rows = state.builder.stored(f"{weight}.rows", codes, codes.shape, (weight, "codes"))
    _, scale = _packed(state, weight, block)
    state.names[node] = state.emit(
        "GatherBlockQuantized",
        [rows, state.value(indices), scale],
        node.name,
        domain=MICROSOFT,
        bits=format.bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )


def _packed(state: State, weight: str, block: int) -> list[str]:
    """The blocks of integers and the scales, as the kernels take them."""
    store, format = _quantized(state, weight)
    rows, columns = state.request.traced.weights[weight].matrix
    blocks = columns // block
    codes = state.builder.stored(
        f"{weight}.blocks",
        store.extents(weight)["codes"],
        (rows, blocks, block * format.bits // 8),
        (weight, "codes"),
    )
    return [codes, scale_of(state.builder, store, weight, format, blocks)]


def _block(state: State, weight: str) -> int:
    """The kernels' block size; 0 for a weight that stays float or that no kernel takes."""
    format = state.request.format_of(weight)
    if not isinstance(format, IntFormat):
        return 0
    try:
        return block_size(weight, format, state.request.traced.weights[weight].matrix[1])
    except WeightRefused:
        return 0


def _quantized(state: State, weight: str) -> tuple[WeightStore, IntFormat]:
    store, format = state.request.store, state.request.format_of(weight)
    assert store is not None and isinstance(format, IntFormat)
    return store, format
