"""Kernels that select rows: of embeddings, and the last token's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import fx

from exporters.executorch.blobs import NIBBLES_SWAPPED, SIGNED, WIDE, WIDENED, Blob
from exporters.executorch.method import SCALAR_TYPES, ScalarType
from quant.formats import IntFormat, parse_format
from quant.program import node_argument, shape_of

if TYPE_CHECKING:
    from exporters.executorch.lowering import MethodLowering

_LAST_INDEX: Final = 2**63 - 1


def embedding(state: MethodLowering, node: fx.Node) -> None:
    """Rows of a table of floats."""
    name, method = state.weight_name(node, 1), state.method
    extent = state.store.extents(name)["value"]
    dtype = state.table_dtype(node)
    wide = extent.dtype == "BF16"
    key = f"{name} {WIDE}" if wide else name
    buffer = state.file.constant(key, Blob(extent, WIDENED if wide else None))
    table = method.constant(dtype, shape_of(node_argument(node, 1)), buffer, key)
    state.tensors[node] = out = method.tensor(dtype, state.dims(node), dynamic=True)
    absent, no = method.integer(-1), method.boolean(False)
    method.call("aten::embedding", "out", table, state.ids, absent, no, no, out=out)


def quant_embedding(state: MethodLowering, node: fx.Node) -> None:
    """Rows of a table in integers; ExecuTorch's own kernel looks them up."""
    name, method = state.weight_name(node, 1), state.method
    format = parse_format(str(node.args[4]))
    assert isinstance(format, IntFormat)
    extents = state.store.extents(name)
    conversion = NIBBLES_SWAPPED if format.bits == 4 else SIGNED
    codes = state.file.constant(f"{name} rows", Blob(extents["codes"], conversion))
    scale = state.file.constant(f"{name} row scale", Blob(extents["scale"]))
    dtype: ScalarType = "uint8" if format.bits == 4 else "int8"
    state.tensors[node] = out = method.tensor("float32", state.dims(node), dynamic=True)
    half = format.implicit_zero_point
    method.call(
        f"quantized_decomposed::embedding_{'4bit' if format.bits == 4 else 'byte'}",
        "dtype_out",
        method.constant(dtype, extents["codes"].shape, codes, f"{name} rows"),
        method.constant("bfloat16", extents["scale"].shape, scale, f"{name} row scale"),
        *(method.none(), method.integer(-half), method.integer(half - 1)),
        *(state.ids, method.integer(SCALAR_TYPES["float32"][0])),
        out=out,
    )


def last(state: MethodLowering, node: fx.Node) -> None:
    """The last token's row of every token's."""
    method, source = state.method, node_argument(node, 0)
    out = state.tensors[node] = method.tensor("float32", state.outer_dims(node), dynamic=False)
    ends = method.integer(-1), method.integer(_LAST_INDEX)
    state.slice(state.tensors[source], 1, *ends, out)
