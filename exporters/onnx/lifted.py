"""Reads what the graphs of an ONNX artifact compute; see `exporters.lifted`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.lifted import (
    Array,
    Attention,
    Cache,
    Columns,
    Constant,
    Embedding,
    EntryPoint,
    Last,
    Linear,
    Norm,
    Numbers,
    Precision,
    Probe,
    Product,
    Reading,
    Rope,
    Silu,
    StoredFormat,
    StoredWeight,
    Sum,
    Tokens,
    Unknown,
    Value,
    are_numbers,
    at,
    probes_of,
    row_numbers,
)
from exporters.onnx.genai_file import stated
from exporters.onnx.model_file import external_place, load_graph
from exporters.onnx.numbers import NUMBERS
from quant.input_files import open_input

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_CHUNK: Final = 64
# Constants of so many bytes are weights under an unknown name, and are not read.
_LARGEST_CONSTANT: Final = 1 << 28
_PASS: Final = ("Identity", "Reshape")
# Everything the lowering emits; any other operator is outside of it.
_EMITTED: Final = frozenset(
    {
        *NUMBERS,
        *_PASS,
        "Div",
        "Neg",
        "Round",
        "ReduceMax",
        "ReduceMin",
        "QuantizeLinear",
        "QGemm",
        "MatMul",
        "FusedMatMul",
        "MatMulNBits",
        "GatherBlockQuantized",
        "GatherND",
        "BitShift",
        "BitwiseAnd",
        "Expand",
        "Transpose",
        "Split",
        "RMSNormalization",
        "SkipSimplifiedLayerNormalization",
        "QuickGelu",
        "RotaryEmbedding",
        "GroupQueryAttention",
    }
)


@dataclass(frozen=True, eq=False)
class _Part(Value):
    """A part of a weight, or what is computed from parts of one weight alone.

    Attributes:
        weight: the weight's name.
        dtype: the format's name of the initializer's dtype; empty for integers.
        shape: the initializer's shape.
        tensor: the initializer; None for what is computed from it.
    """

    weight: str
    dtype: str
    shape: tuple[int, ...]
    tensor: TensorProto | None = None


def read_graphs(folder: Path, graphs: list[Path], context: int) -> Reading:
    """Lifts every graph of an artifact.

    Args:
        folder: the artifact.
        graphs: its ONNX files.
        context: the declared context, tokens.

    Raises:
        ExportError: a file is missing or damaged.
    """
    probes = probes_of(context, (1, _CHUNK))
    tables: dict[tuple[object, ...], Array] = {}
    entry_points = []
    for path in graphs:
        with one_sentence(path, "an ONNX model"):
            entry_points.append(_Graph(path, probes, tables).lift())
    lengths, ids = stated(folder)
    return Reading(tuple(entry_points), context=lengths, ids=ids)


class _Graph:
    """One graph being lifted.

    Args:
        path: the file.
        probes: the calls for which numbers are computed.
        tables: arrays that were read already, by their place; several graphs share them.
    """

    def __init__(
        self, path: Path, probes: tuple[Probe, ...], tables: dict[tuple[object, ...], Array]
    ) -> None:
        self.path, self.probes, self.tables = path, probes, tables
        self.graph = load_graph(path).graph
        self.values: dict[str, Value] = {}
        self.outside: list[str] = []

    def lift(self) -> EntryPoint:
        """Goes through the nodes in order; every handler gives the values of a node's outputs."""
        mask = tuple(np.ones((1, p.start + p.count), np.int64) for p in self.probes)
        self.values = {
            "input_ids": Tokens("input_ids"),
            "attention_mask": Numbers("attention_mask", mask),
        }
        for tensor in self.graph.initializer:
            self.values[tensor.name] = self._initializer(tensor)
        self.results = {output.name for output in self.graph.output}
        for node in self.graph.node:
            if node.op_type not in _EMITTED:
                self.outside.append(f"{node.op_type} at {node.output[0]}")
            given = tuple(self.values.get(name, Unknown(name, "input")) for name in node.input)
            for name, value in zip(node.output, self._lifted(node, given), strict=False):
                if name:
                    self.values[name] = value
        if "logits" not in self.values:
            raise ExportError(f"{self.path} has no output logits")
        return EntryPoint(self.path.name, self.values["logits"], self.probes, tuple(self.outside))

    def _initializer(self, tensor: TensorProto) -> Value:
        weight, found, suffix = tensor.name.partition(".weight")
        if found and (not suffix or suffix.startswith(_PART_SUFFIXES)):
            dtype = {1: "fp32", 10: "fp16", 16: "bf16"}.get(tensor.data_type, "")
            return _Part(tensor.name, weight + found, dtype, tuple(tensor.dims), tensor)
        return Constant(tensor.name, self._array(tensor))

    def _array(self, tensor: TensorProto) -> Array:
        from onnx import helper, numpy_helper

        if not tensor.external_data:
            return np.asarray(numpy_helper.to_array(tensor))
        place = external_place(tensor, self.path)
        if place[2] > _LARGEST_CONSTANT:
            raise ExportError(f"{self.path} has a constant of {place[2]} bytes: {tensor.name}")
        key = (*place, tensor.data_type, *tensor.dims)
        if key not in self.tables:
            with open_input(place[0]) as stream:
                stream.seek(place[1])
                data = stream.read(place[2])
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            self.tables[key] = np.frombuffer(data, dtype).reshape(tensor.dims)
        return self.tables[key]

    def _lifted(self, node: NodeProto, given: tuple[Value, ...]) -> tuple[Value, ...]:
        from onnx import helper

        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        kind, name = node.op_type, node.output[0]
        if kind == "Shape" and isinstance(given[0], Tokens):
            shapes = tuple(np.array([1, p.count], np.int64) for p in self.probes)
            return (Numbers(name, shapes),)
        if kind in NUMBERS and given and are_numbers(given):
            arrays = tuple(
                NUMBERS[kind]([at(value, i) for value in given], attributes)
                for i in range(len(self.probes))
            )
            return (Numbers(name, arrays),)
        if kind in _HANDLERS:
            lifted = _HANDLERS[kind](self, node, given, attributes)
            if lifted is not None:
                return lifted
        first = given[0] if given else None
        if isinstance(first, _Part):  # casts, repeats and values of single columns
            return (_Part(name, first.weight, first.dtype, first.shape, first.tensor),)
        if kind in _PASS:
            return given[:1]
        return tuple(Unknown(each, kind, given) for each in node.output)


_PART_SUFFIXES: Final = (
    ".blocks",
    ".rows",
    ".scale",
    ".zero",
    ".input_scale",
    ".stored",
)
Lifted = tuple[Value, ...] | None
Handler = Callable[[_Graph, "NodeProto", tuple[Value, ...], Mapping[str, Any]], Lifted]
"""Lifts a node; None where the form is not the lowering's."""


def _format(codes: Value, scale: Value, zero: Value | None, bits: int) -> StoredFormat | None:
    if not isinstance(codes, _Part) or not isinstance(scale, _Part):
        return None
    parts = [part for part in (codes, scale, zero) if isinstance(part, _Part)]
    if any(part.weight != codes.weight for part in parts):
        return None  # scales or zero points of another weight
    return StoredFormat("int", bits, scale.shape[-1], zero is not None)


def _nbits(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    zero = given[3] if len(given) > 3 and node.input[3] else None
    format = _format(given[1], given[2], zero, attributes.get("bits", 4))
    if format is None or not isinstance(given[1], _Part):
        return None
    level = attributes.get("accuracy_level", 0)
    precision: Precision = "int8" if level == 4 else "float32"
    weight = StoredWeight(given[1].weight, format)
    return (Linear(node.output[0], given[0], weight, precision),)


def _lookup(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    zero = given[3] if len(given) > 3 and node.input[3] else None
    format = _format(given[0], given[2], zero, attributes.get("bits", 4))
    if format is None or not isinstance(given[0], _Part) or not isinstance(given[1], Tokens):
        return None
    return (Embedding(node.output[0], StoredWeight(given[0].weight, format)),)


def _gather(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    table = given[0]
    if isinstance(table, _Part) and isinstance(given[1], Tokens):
        weight = StoredWeight(table.weight, StoredFormat(table.dtype))
        return (Embedding(node.output[0], weight),)
    return None


def _cast(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    # Only an embedding's rows are cast besides weights; a cast to less than float32 loses digits.
    return given[:1] if isinstance(given[0], Embedding) and attributes["to"] == 1 else None


def _matmul(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    weight = given[1]
    plain = attributes.get("transB") == 1 and not attributes.get("transA")
    if not isinstance(weight, _Part) or not plain or attributes.get("alpha") != 1.0:
        return None
    stored = StoredWeight(weight.weight, StoredFormat(weight.dtype))
    return (Linear(node.output[0], given[0], stored, "float32"),)


def _norm(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    made = _normed(graph, node.output[0], given[0], given[1], attributes)
    return None if made is None else (made,)


def _normed(
    graph: _Graph, name: str, source: Value, weight: Value, attributes: Mapping[str, Any]
) -> Norm | None:
    if not isinstance(weight, _Part) or weight.tensor is None:
        return None
    values = graph._array(weight.tensor).astype(np.float32)
    stored = StoredWeight(weight.weight, StoredFormat(weight.dtype))
    epsilon = float(attributes.get("epsilon", 1e-5))
    return Norm(name, source, stored, values, epsilon)


def _skip_norm(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    names = [*node.output, "", "", ""]
    total = Sum(names[3] or f"{names[0]}_sum", (given[0], given[1]))
    normed = _normed(graph, names[0], total, given[2], attributes)
    if normed is None:
        return None
    return (normed, Unknown("", "mean"), Unknown("", "deviation"), total)


def _add(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    name, first, second = node.output[0], given[0], given[1]
    return (_parted(name, first, second) or Sum(name, (first, second)),)


def _parted(name: str, rounded: Value, exact: Value) -> Value | None:
    """A product of which some columns are multiplied apart; see `exporters.onnx.quantized`."""
    if not (isinstance(rounded, Linear) and isinstance(exact, Unknown) and exact.kind == "MatMul"):
        return None
    rest, (large, values) = rounded.source, exact.operands
    if not (isinstance(rest, Product) and isinstance(large, Unknown) and large.kind == "Gather"):
        return None
    source, columns = large.operands
    mask = rest.factors[1]
    if not (isinstance(columns, Constant) and isinstance(mask, Constant)):
        return None
    kept = tuple(map(int, columns.array))
    same = isinstance(values, _Part) and values.weight == rounded.weight.name
    whole = tuple(map(int, np.flatnonzero(mask.array == 0))) == kept
    if not (same and whole and source is rest.factors[0] and set(mask.array.tolist()) <= {0, 1}):
        return None
    return Linear(name, source, rounded.weight, rounded.precision, kept)


def _mul(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    first, second = given
    if isinstance(first, _Part):
        return None
    if isinstance(first, Unknown) and first.kind == "QGemm per token":
        product = first.operands[0]
        assert isinstance(product, Linear)
        if product.source in _ancestors(second):
            return (product,)
        return None
    return (Product(node.output[0], (first, second)),)


def _ancestors(value: Value) -> list[Value]:
    """An unknown value's operands, theirs, and so on."""
    found, waiting = [], [value]
    while waiting:
        found.append(waiting.pop())
        if isinstance(found[-1], Unknown):
            waiting.extend(found[-1].operands)
    return found


def _silu(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    return (Silu(node.output[0], given[0]),) if attributes.get("alpha") == 1.0 else None


def _split(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    sizes = given[1]
    if not isinstance(sizes, Constant) or attributes.get("axis", 0) != -1:
        return None
    ends = np.cumsum(sizes.array).tolist()
    starts = [0, *ends[:-1]]
    return tuple(
        Columns(name, given[0], start, stop)
        for name, start, stop in zip(node.output, starts, ends, strict=True)
    )


def _last(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    if not isinstance(given[1], Numbers) or attributes.get("batch_dims") != 1:
        return None
    rows = row_numbers(given[1], len(graph.probes))
    wanted = tuple((probe.count - 1,) for probe in graph.probes)
    return (Last(node.output[0], given[0]),) if rows == wanted else None


def _quantize(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    fixed = isinstance(given[1], _Part)
    kind = "int8-tensor" if fixed else "int8-token"
    return (Unknown(node.output[0], kind, given),)


def _qgemm(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    codes, rows, scale = given[0], given[3], given[4]
    if not (isinstance(codes, Unknown) and isinstance(rows, _Part) and isinstance(scale, _Part)):
        return None
    if rows.weight != scale.weight or codes.kind not in ("int8-token", "int8-tensor"):
        return None
    weight = StoredWeight(rows.weight, StoredFormat("int", 8, 1))
    per_token = codes.kind == "int8-token"
    precision: Precision = "int8-token" if per_token else "int8-tensor"
    product = Linear(node.output[0], codes.operands[0], weight, precision)
    if per_token:  # the step of each token follows
        return (Unknown(node.output[0], "QGemm per token", (product,)),)
    return (product,)


def _rope(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    source, cos, sin, rows = given[:4]
    if not (isinstance(cos, Constant) and isinstance(sin, Constant) and isinstance(rows, Numbers)):
        return None
    if attributes.get("interleaved", 0):
        return None
    return (
        Rope(node.output[0], source, cos.array, sin.array, row_numbers(rows, len(graph.probes))),
    )


def _attention(
    graph: _Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    q, k, v, _, _, lengths, total, *more = given
    if not (isinstance(lengths, Numbers) and isinstance(total, Numbers)):
        return None
    name, window = node.output[0], attributes.get("local_window_size", -1)
    # The kernel takes a row's length less one, and puts the new tokens at its end.
    ends = [int(lengths.arrays[i].ravel()[0]) + 1 for i in range(len(graph.probes))]
    rows = tuple(
        tuple(range(end - probe.count, end)) for end, probe in zip(ends, graph.probes, strict=True)
    )
    if attributes.get("do_rotary"):
        if not (len(more) > 1 and isinstance(more[0], Constant) and isinstance(more[1], Constant)):
            return None
        cos, sin = more[0].array, more[1].array
        q, k = (
            Rope(f"{name} of {part}", source, cos, sin, rows)
            for part, source in (("q", q), ("k", k))
        )
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    past = next(given for given in graph.graph.input if given.name == node.input[3])
    width = past.type.tensor_type.shape.dim[3].dim_value
    written = [name if name in graph.results else f"{name}, no output" for name in node.output[1:]]
    keys, values = (
        Cache(_cache(read), _cache(to), None, rows)
        for read, to in zip(node.input[3:5], written, strict=True)
    )
    visible = tuple(
        _seen(probe, own, window) for probe, own in zip(graph.probes, rows, strict=True)
    )
    scale = float(attributes.get("scale", 0.0)) or width**-0.5
    made = Attention(name, q, k, v, (heads, kv_heads, width), scale, keys, values, visible)
    return (made, Unknown(node.output[1], "cache"), Unknown(node.output[2], "cache"))


def _cache(name: str) -> str:
    """A cache's name without the side on which it enters or leaves: ``3.key``."""
    return name.removeprefix("past_key_values.").removeprefix("present.")


def _seen(probe: Probe, rows: tuple[int, ...], window: int) -> Array:
    own, keys = np.array(rows)[:, None], np.arange(probe.start + probe.count)[None]
    seen = keys <= own
    return seen & (keys > own - window) if window > 0 else seen


_HANDLERS: Final[Mapping[str, Handler]] = {
    "MatMulNBits": _nbits,
    "GatherBlockQuantized": _lookup,
    "Gather": _gather,
    "Cast": _cast,
    "FusedMatMul": _matmul,
    "RMSNormalization": _norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "Add": _add,
    "Mul": _mul,
    "QuickGelu": _silu,
    "Split": _split,
    "GatherND": _last,
    "QuantizeLinear": _quantize,
    "QGemm": _qgemm,
    "RotaryEmbedding": _rope,
    "GroupQueryAttention": _attention,
}
