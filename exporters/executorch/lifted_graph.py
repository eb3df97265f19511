"""Lifts the graph of an XNNPACK delegate, as `exporters.executorch.xnnpack_graph` writes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from exporters.executorch import xnnpack_graph
from exporters.executorch.blobs import TAPS, WIDE
from exporters.executorch.flatbuffer import Record
from exporters.executorch.lifted_adapters import adapted
from exporters.executorch.lifted_capped import Seen, mixed, turned
from exporters.executorch.lifted_forms import plus, rotated, times
from exporters.executorch.lifted_heads import permuted
from exporters.executorch.lifted_products import by_constant, parted, whole
from exporters.executorch.lifted_values import (
    Files,
    Grouped,
    Joined,
    Part,
    Recalled,
    Rounded,
    operands,
)
from exporters.executorch.pte_file import is_weight
from exporters.lifted import (
    Array,
    Bias,
    Clamp,
    Columns,
    Constant,
    Embedding,
    Gelu,
    Last,
    LayerNorm,
    Linear,
    Product,
    Recent,
    ShortConv,
    Sigmoid,
    StoredFormat,
    StoredWeight,
    Sum,
    Unknown,
    Value,
)
from exporters.lifted_recurrent import (
    Function,
    Previous,
)

_INPUT, _OUTPUT = 1, 2
_NO_BIAS: Final = 0xFFFFFFFF
_SIDES: Final = ("height", "width")
_FLOATS: Final[Mapping[int, tuple[str, type]]] = {
    xnnpack_graph.FP32: ("fp32", np.float32),
    xnnpack_graph.FP16: ("fp16", np.float16),
}
_BITS: Final = {xnnpack_graph.QCINT8: 8, xnnpack_graph.QCINT4: 4, xnnpack_graph.QBINT4: 4}


class Delegate:
    """One run of a delegate.

    Args:
        graph: its graph.
        files: reads its constants.
        name: where it stands, in words.
        written: the states that get the last rows of an output, by the output's external number.
        seen: what tokens see of caches, found before, by what it was made of.
    """

    def __init__(
        self,
        graph: Record,
        files: Files,
        name: str,
        written: Mapping[int, str] | None = None,
        seen: Seen | None = None,
    ) -> None:
        self.graph, self.files, self.name = graph, files, name
        self.written = written or {}
        self.seen: Seen = {} if seen is None else seen
        self.limits: dict[int, Record] = {}
        self.outputs: dict[int, int] = {}
        self.values: dict[int, Value] = {}
        self.dims: dict[int, tuple[int, ...]] = {}
        self.datatypes: dict[int, int] = {}
        self.widths: dict[int, int] = {}  # of what norms normalise, by the norm's id

    def run(self, inputs: Sequence[Value]) -> list[Value]:
        """Lifts the graph for what its inputs are; returns its outputs in their order."""
        outputs: dict[int, int] = {}
        for row in self.graph["xvalues"]:
            value, quantization = row["xvalue_union"], None
            if value.table == "XNNQuantizedTensorValue":
                value, quantization = value["tensor_value"], value["quant_params"]
            number = value["id_out"]
            self.dims[number] = tuple(value["dims"])
            self.datatypes[number] = value["datatype"]
            if value["constant_buffer_idx"]:
                self.values[number] = self._constant(number, value, quantization)
            elif value["flags"] & _INPUT:
                self.values[number] = inputs[value["external_id"]]
            elif value["flags"] & _OUTPUT:
                outputs[value["external_id"]] = number
        self.outputs = {number: place for place, number in outputs.items()}
        for row in self.graph["xnodes"]:
            node = row["xnode_union"]
            result = node["output_id"]
            handler = _HANDLERS.get(node.table)
            if row["output_min_max"] is not None:
                self.limits[result] = row["output_min_max"]
                handler = handler if node.table == "XNNClamp" else None
            made = None if handler is None else handler(self, node)
            made = None if made is None else self._biased(made, node)
            if made is None:
                made = Unknown(self.label(result), node.table, self._given(node))
            self.values[result] = made
        return [self.values[outputs[place]] for place in sorted(outputs)]

    def _biased(self, made: Value, node: Record) -> Value | None:
        """A result with the vector that its node adds; None where that is no weight's."""
        number = node.fields.get("bias_id", _NO_BIAS)
        if number == _NO_BIAS:
            return made
        assert isinstance(number, int)
        added = self.value(number)
        return plus(made.name, made, added)

    def label(self, number: int) -> str:
        """A value's name in messages."""
        return f"{self.name}, value {number}"

    def value(self, number: int) -> Value:
        """A value by its number."""
        return self.values.get(number, Unknown(self.label(number), "absent"))

    def _given(self, node: Record) -> tuple[Value, ...]:
        names = ("input_id", "input1_id", "input2_id", "filter_id")
        return tuple(self.value(node[name]) for name in names if name in node.fields)

    def _constant(self, number: int, value: Record, quantization: Record | None) -> Value:
        data = self.graph["constant_data"]
        key = data[value["constant_buffer_idx"]]["named_key"]
        datatype, dims = value["datatype"], self.dims[number]
        name, _, part = key.partition(" ")
        if quantization is not None:
            scale_key = data[quantization["scale_buffer_idx"]]["named_key"]
            if not is_weight(key) or scale_key != key.replace("codes", "scale"):
                return Unknown(key, "a weight with the scales of another")
            groups = quantization["num_scales"] // dims[0]
            format = StoredFormat("int", _BITS.get(datatype, 0), groups)
            group = part.partition(" ")[2]
            weight = StoredWeight(name, format)
            return Part(key, weight, int(group) if group.isdecimal() else None)
        if datatype not in _FLOATS:
            return Unknown(key, "a constant of another dtype")
        kind, dtype = _FLOATS[datatype]
        if key == name or part == WIDE:
            weight = StoredWeight(name, StoredFormat("bf16" if part == WIDE else kind))
            matrix = len(dims) == 2 and dims[1] > 1
            vector = None if matrix else self._array(key, dtype, dims).astype(np.float32)
            if is_weight(key):
                return Part(key, weight, values=vector)
        if part == TAPS and is_weight(key):
            values = self._array(key, dtype, dims).reshape(dims[-2:]).T
            return Part(key, StoredWeight(name, StoredFormat(kind)), values=values)
        return Constant(key, self._array(key, dtype, dims))

    def _array(self, key: str, dtype: type, dims: tuple[int, ...]) -> Array:
        return self.files.array(self.files.named[key], dtype, dims)


def _convert(run: Delegate, node: Record) -> Value | None:
    source = run.value(node["input_id"])
    to = run.datatypes[node["output_id"]]
    if to == xnnpack_graph.QDINT8:
        return Rounded(run.label(node["output_id"]), source)
    if isinstance(source, Part):
        return source
    return source if to == xnnpack_graph.FP32 else None


def _reshape(run: Delegate, node: Record) -> Value | None:
    return run.value(node["input_id"])


def _columns(run: Delegate, node: Record) -> Value | None:
    *others, start = node["offsets"]
    *wholes, size = node["sizes"]
    if any(others) or any(wholes):
        return None
    name = run.label(node["output_id"])
    return Columns(name, run.value(node["input_id"]), start, start + size)


def _product(run: Delegate, node: Record) -> Value | None:
    name, source = run.label(node["output_id"]), run.value(node["input1_id"])
    filter = run.value(node["filter_id"])
    if isinstance(filter, Constant):
        return by_constant(name, source, filter)
    if not isinstance(filter, Part):
        return None
    if isinstance(source, Rounded):
        return Linear(name, source.source, filter.weight, "int8-token")
    if filter.group is None:
        return Linear(name, source, filter.weight, "float32")
    size = run.dims[node["filter_id"]][1]
    begin = filter.group * size
    if not isinstance(source, Columns) or (source.start, source.stop) != (begin, begin + size):
        return None
    width = run.dims[_columns_of(run, node["input1_id"])][-1]
    weight = StoredWeight(
        filter.weight.name, StoredFormat("int", filter.weight.format.bits, width // size)
    )
    return whole(Grouped(name, source.source, weight, size, (filter.group,)))


def _columns_of(run: Delegate, number: int) -> int:
    """The number of the value of which another is a slice."""
    for row in run.graph["xnodes"]:
        node = row["xnode_union"]
        if node.table == "XNNStaticSlice" and node["output_id"] == number:
            return int(node["input_id"])
    return number


def _add(run: Delegate, node: Record) -> Value | None:
    name = run.label(node["output_id"])
    first, second = run.value(node["input1_id"]), run.value(node["input2_id"])
    if isinstance(first, Grouped) and isinstance(second, Grouped):
        same = (first.source, first.weight) == (second.source, second.weight)
        groups = first.groups + second.groups
        return (
            whole(Grouped(name, first.source, first.weight, first.size, groups)) if same else None
        )
    if isinstance(first, Bias) and operands(second, "exact") is not None:
        product = parted(name, first.source, second)
        return None if product is None else Bias(name, product, first.weight, first.values)
    found = adapted(first, second) or parted(name, first, second) or plus(name, first, second)
    return found or Sum(name, (first, second))


def _multiply(run: Delegate, node: Record) -> Value | None:
    name = run.label(node["output_id"])
    pair = run.value(node["input1_id"]), run.value(node["input2_id"])
    found = times(name, *pair, run.widths) or times(name, *pair[::-1], run.widths)
    if isinstance(found, LayerNorm):
        run.widths[id(found)] = run.dims[node["output_id"]][-1]
    return found or Product(name, pair)


def _clamp(run: Delegate, node: Record) -> Value | None:
    limits = run.limits.get(node["output_id"])
    if limits is None:
        return None
    name, source = run.label(node["output_id"]), run.value(node["input_id"])
    low, high = float(limits["output_min"]), float(limits["output_max"])
    if (low, high) == (0.0, math.inf):
        return Function(name, source, "relu")
    return Clamp(name, source, high) if low == -high else None


def _tanh(run: Delegate, node: Record) -> Value | None:
    return Function(run.label(node["output_id"]), run.value(node["input_id"]), "tanh")


def _exp(run: Delegate, node: Record) -> Value | None:
    return Function(run.label(node["output_id"]), run.value(node["input_id"]), "exp")


def _gelu(run: Delegate, node: Record) -> Value | None:
    return Gelu(run.label(node["output_id"]), run.value(node["input_id"]), tanh=False)


def _sigmoid(run: Delegate, node: Record) -> Value | None:
    return Sigmoid(run.label(node["output_id"]), run.value(node["input_id"]))


def _transpose(run: Delegate, node: Record) -> Value | None:
    number = node["input_id"]
    name, order = run.label(node["output_id"]), tuple(node["perm"])
    given = name, run.value(number), order, run.dims[number]
    return permuted(*given) or turned(*given)


def _batched(run: Delegate, node: Record) -> Value | None:
    name = run.label(node["output_id"])
    pair = run.value(node["input1_id"]), run.value(node["input2_id"])
    if node["flags"]:
        return Unknown(name, "scores", pair) if node["flags"] == 1 else None
    return mixed(name, *pair, run.seen)


def _convolve(run: Delegate, node: Record) -> Value | None:
    """A convolution of each column over rows that are joined to those before them, or a shift."""
    row, filter = run.value(node["input1_id"]), run.value(node["filter_id"])
    taps = filter.values if isinstance(filter, Part) else _shift_of(filter)
    if not isinstance(row, Joined) or taps is None:
        return None
    columns, width = taps.shape
    plain = all(node[f"padding_{side}"] == 0 for side in ("top", "right", "bottom", "left"))
    steps = (f"{what}_{side}" for what in ("subsampling", "dilation") for side in _SIDES)
    plain = plain and all(node[step] == 1 for step in steps)
    kernel = node["kernel_height"], node["kernel_width"], node["groups"]
    if not plain or kernel != (1, width, columns) or row.before.tokens != width - 1:
        return None
    recent = Recent(row.before.state, row.written, row.before.ignored)
    name = run.label(node["output_id"])
    if not isinstance(filter, Part):
        return Previous(name, row.source, recent)
    return ShortConv(name, row.source, filter.weight, taps, recent)


def _shift_of(filter: Value) -> Array | None:
    """The taps ``[n, 2]`` of a constant that gives each row's predecessor; None for another."""
    if not isinstance(filter, Constant) or filter.array.shape[:3] != (1, 1, 2):
        return None
    taps = filter.array[0, 0].T
    return taps if np.all(taps == (1, 0)) else None


def _subtract(run: Delegate, node: Record) -> Value | None:
    pair = run.value(node["input1_id"]), run.value(node["input2_id"])
    return Unknown(run.label(node["output_id"]), "difference", pair)


def _concatenate(run: Delegate, node: Record) -> Value | None:
    name = run.label(node["output_id"])
    count = int(node.table.removeprefix("XNNConcatenate"))
    parts = [run.value(node[f"input{i + 1}_id"]) for i in range(count)]
    if node["axis"] != len(run.dims[node["output_id"]]) - 1:
        return _joined(run, node, parts)
    if count == 2 and all(isinstance(part, Columns) for part in parts):
        return _exchanged(parts[0], parts[1])
    return rotated(name, parts)


def _joined(run: Delegate, node: Record, parts: Sequence[Value]) -> Value | None:
    """A call's tokens behind those before it."""
    if node["axis"] != 1 or len(parts) != 2 or not isinstance(parts[0], Recalled):
        return None
    number = node["output_id"]
    written = run.written.get(run.outputs.get(number, -1), "")
    return Joined(run.label(number), parts[0], parts[1], written)


def _exchanged(first: Value, second: Value) -> Value | None:
    """Columns of an embedding whose pairs its kernel returns exchanged."""
    if not (isinstance(first, Columns) and isinstance(second, Columns)):
        return None
    turned = (first.start, first.stop, second.start, second.stop) == (1, 2, 0, 1)
    if not turned or first.source is not second.source:
        return None
    source = first.source
    inner = operands(source.source if isinstance(source, Last) else source, "exchanged pairs")
    if inner is None or not isinstance(inner[0], Embedding):
        return None
    return Last(source.name, inner[0]) if isinstance(source, Last) else inner[0]


_HANDLERS: Final[Mapping[str, Callable[[Delegate, Any], Value | None]]] = {
    "XNNConvert": _convert,
    "XNNStaticReshape": _reshape,
    "XNNStaticSlice": _columns,
    "XNNFullyConnected": _product,
    "XNNAdd": _add,
    "XNNMultiply": _multiply,
    "XNNSubtract": _subtract,
    "XNNClamp": _clamp,
    "XNNTanh": _tanh,
    "XNNExp": _exp,
    "XNNGelu": _gelu,
    "XNNSigmoid": _sigmoid,
    "XNNStaticTranspose": _transpose,
    "XNNBatchMatrixMultiply": _batched,
    "XNNDepthwiseConv2d": _convolve,
    "XNNConcatenate2": _concatenate,
    "XNNConcatenate3": _concatenate,
}
