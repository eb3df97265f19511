"""Emits the kernels that select rows: those of an embedding, and the last tokens' rows."""

from __future__ import annotations

from torch import fx

from exporters.executorch.blobs import NIBBLES_SWAPPED, SIGNED, WIDE, WIDENED, Blob, Conversion
from exporters.executorch.capped_attention import last_of
from exporters.executorch.method import SCALAR_TYPES, ScalarType
from exporters.executorch.pte_file import HEAD_ROWS, ROW_SCALE, ROWS, WIDE_ROW_SCALE
from exporters.executorch.state import LAST_INDEX, MethodLowering
from quant.program.calls import QuantizedCall
from quant.program.program import node_argument, shape_of


def embedding(state: MethodLowering, node: fx.Node) -> None:
    """Emits the lookup of rows in a float table."""
    name, method = state.weight_name(node, 1), state.method
    extent = state.store.extents(name)["value"]
    dtype = state.table_dtype(node)
    wide = extent.dtype == "BF16"
    key = f"{name} {WIDE}" if wide else name
    blob = Blob(extent, WIDENED if wide else None)
    table = state.weight_table(key, blob, dtype, shape_of(node_argument(node, 1)))
    state.tensors[node] = out = method.tensor(dtype, state.dims(node), dynamic=True)
    absent, no = method.integer(-1), method.boolean(False)
    method.call("aten::embedding", "out", table, state.ids, absent, no, no, out=out)


def quant_embedding(state: MethodLowering, node: fx.Node) -> None:
    """Emits the lookup of rows in an integer table, by ExecuTorch's own kernel.

    Where the weights are in a file of their own, a table that is also the head's matrix shares the
    head's bytes. The kernel then returns 4-bit codes with the columns of each pair exchanged, and
    `MethodLowering.value` exchanges them back.
    """
    name, method = state.weight_name(node, 1), state.method
    format = QuantizedCall.of(node).integers
    extents = state.store.extents(name)
    shared = state.shares_head(node)
    rows = ROWS
    conversion: Conversion | None = NIBBLES_SWAPPED if format.bits == 4 else SIGNED
    if format.bits == 4 and shared:
        rows, conversion = HEAD_ROWS, None
        state.exchanged.add(node)
    dtype: ScalarType = "uint8" if format.bits == 4 else "int8"
    # The head's products read scales of rows as float32.
    wide = shared and format.group_size is None
    state.tensors[node] = out = method.tensor("float32", state.dims(node), dynamic=True)
    half = format.implicit_zero_point
    method.call(
        f"quantized_decomposed::embedding_{'4bit' if format.bits == 4 else 'byte'}",
        "dtype_out",
        state.weight_table(
            f"{name} {rows}", Blob(extents["codes"], conversion), dtype, extents["codes"].shape
        ),
        state.weight_table(
            f"{name} {WIDE_ROW_SCALE if wide else ROW_SCALE}",
            Blob(extents["scale"], WIDENED if wide else None),
            "float32" if wide else "bfloat16",
            extents["scale"].shape,
        ),
        method.none(),
        method.integer(-half),
        method.integer(half - 1),
        state.ids,
        method.integer(SCALAR_TYPES["float32"][0]),
        out=out,
    )


def last(state: MethodLowering, node: fx.Node) -> None:
    """Emits the selection of the last token's row, or of the last few: of those that are there."""
    method, source = state.method, node_argument(node, 0)
    if source in state.scored:
        last_of(state, node, source)
        return
    dims = state.outer_dims(node)
    out = state.tensors[node] = method.tensor(
        state.outer_dtype(node), dims, dynamic=state.is_dynamic(node)
    )
    ends = method.integer(-node.meta["positions"]), method.integer(LAST_INDEX)
    state.slice(state.tensors[source], 1, *ends, out)
