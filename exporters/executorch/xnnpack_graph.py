"""One XNNPACK delegate's program under construction: values, nodes, and weights by key."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from exporters.executorch.blobs import SIGNED, TAPS, WIDE, WIDENED, Blob, Made
from exporters.executorch.flatbuffer import Record
from exporters.executorch.pte_file import PteFile
from exporters.executorch.schemas import XNNPACK
from exporters.float_columns import column_values
from quant.formats.formats import IntFormat
from quant.store.store import WeightStore

Binary = Literal["XNNAdd", "XNNMultiply", "XNNSubtract", "XNNDiv", "XNNMaximum"]
Unary = Literal[
    "XNNSigmoid",
    "XNNReciprocalSquareRoot",
    "XNNConvert",
    "XNNNegate",
    "XNNTanh",
    "XNNGelu",
    "XNNSoftmax",
    "XNNExp",
    "XNNLog",
    "XNNAbs",
]

FP32, FP16, QCINT8, QCINT4, QDINT8, QBINT4 = 1, 2, 6, 8, 9, 10
_NOT_EXTERNAL: Final = 0xFFFFFFFF
_BY_KEY: Final = 0xFFFFFFFFFFFFFFFF
_INPUT, _OUTPUT = 1, 2
_TRANSPOSED_SECOND: Final = 1  # the flag of a product of matrices whose second is transposed
# Zeros, the magic number, the header's own length, the offset and the length of the graph, the
# offset and the length of the constants.
HEADER: Final = struct.Struct("<4s4sHIIIQ2x")
HEADER_MAGIC: Final = b"XH00"
_HEADER_LENGTH = 30


class XnnpackGraph:
    """A graph that computes in float32, with weights in the store's formats.

    A number identifies each value. The dimension of the tokens is written as its largest size; the
    runtime sets the actual size at each run.

    Args:
        file: the file in which weights are registered by key.
        store: the store of the weights.
    """

    def __init__(self, file: PteFile, store: WeightStore) -> None:
        self._file, self._store = file, store
        self._values: list[Record] = []
        self._nodes: list[Record] = []
        self._dims: list[tuple[int, ...]] = []
        self._data = [Record("ConstantDataOffset", {"offset": 0, "size": 0, "named_key": ""})]
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._tensors: list[dict[str, object]] = []
        self._quantized: dict[int, int] = {}
        self._constants: dict[str, int] = {}

    def dims(self, value: int) -> tuple[int, ...]:
        """A value's shape for the largest number of tokens."""
        return self._dims[value]

    def _value(
        self,
        dims: Sequence[int],
        datatype: int = FP32,
        data: int = 0,
        quantization: Record | None = None,
    ) -> int:
        number = len(self._values)
        tensor = _tensor_fields(number, dims, datatype, data)
        union = Record("XNNTensorValue", tensor)
        if quantization is not None:
            parts = {"tensor_value": union, "quant_params": quantization}
            union = Record("XNNQuantizedTensorValue", parts)
        self._values.append(Record("XValue", {"xvalue_union": union}))
        self._tensors.append(tensor)
        self._dims.append(tuple(dims))
        return number

    def _node(self, kind: str, /, limits: Record | None = None, **fields: object) -> None:
        node: dict[str, object] = {
            "xnode_union": Record(kind, {"flags": 0, **fields}),
            "debug_handle": len(self._nodes),
        }
        if limits is not None:
            node["output_min_max"] = limits
        self._nodes.append(Record("XNode", node))

    def input(self, dims: Sequence[int], datatype: int = FP32) -> int:
        """Declares the graph's next input."""
        value = self._value(dims, datatype)
        self._tensors[value] |= {"flags": _INPUT, "external_id": len(self._inputs)}
        self._inputs.append(value)
        return value

    def output(self, value: int) -> None:
        """Makes a value the graph's next output; call it after the last `input`."""
        self._tensors[value] |= {
            "flags": _OUTPUT,
            "external_id": len(self._inputs) + len(self._outputs),
        }
        self._outputs.append(value)

    def _stored(self, key: str, blob: Blob) -> int:
        size = self._file.named(key, blob)
        self._data.append(named_constant(key, size))
        return len(self._data) - 1

    def constant(self, key: str, values: Sequence[float], dims: Sequence[int]) -> int:
        """Adds float32 numbers that are not a weight, under a key that describes them."""
        return self._array(key, np.array(values, np.float32).reshape(dims))

    def weight(self, name: str, dims: Sequence[int]) -> int:
        """Adds a float weight under its name: float16 as it is stored, other dtypes as float32."""
        if name not in self._constants:
            extent = self._store.extents(name)["value"]
            datatype = FP16 if extent.dtype == "F16" else FP32
            conversion = WIDENED if extent.dtype == "BF16" else None
            key = f"{name} {WIDE}" if conversion else name
            data = self._stored(key, Blob(extent, conversion))
            self._constants[name] = self._value(dims, datatype, data)
        return self._constants[name]

    def binary(self, kind: Binary, first: int, second: int) -> int:
        """Emits a pointwise operation with broadcasting."""
        dims = [max(pair) for pair in _aligned(self._dims[first], self._dims[second])]
        result = self._value(dims)
        self._node(kind, input1_id=first, input2_id=second, output_id=result)
        return result

    def unary(self, kind: Unary, source: int, datatype: int = FP32) -> int:
        """Emits a pointwise function."""
        result = self._value(self._dims[source], datatype)
        self._node(kind, input_id=source, output_id=result)
        return result

    def clamp(self, source: int, low: float, high: float) -> int:
        """Emits bounds: values stay within ``low`` and ``high``."""
        result = self._value(self._dims[source])
        limits = Record("OutputMinMax", {"output_min": low, "output_max": high})
        self._node("XNNClamp", limits, input_id=source, output_id=result)
        return result

    def transpose(self, source: int, order: Sequence[int]) -> int:
        """Emits a permutation of the dimensions."""
        result = self._value([self._dims[source][place] for place in order])
        self._node(
            "XNNStaticTranspose",
            num_dims=len(order),
            perm=list(order),
            input_id=source,
            output_id=result,
        )
        return result

    def batched(self, first: int, second: int, *, transposed: bool = False) -> int:
        """Emits ``first @ second`` of the last two dimensions, or ``first @ second.T``."""
        columns = self._dims[second][-2 if transposed else -1]
        result = self._value([*self._dims[first][:-1], columns])
        self._node(
            "XNNBatchMatrixMultiply",
            input1_id=first,
            input2_id=second,
            output_id=result,
            flags=_TRANSPOSED_SECOND if transposed else 0,
        )
        return result

    def reshape(self, source: int, shape: Sequence[int]) -> int:
        """Emits a reshape; -1 stands for the number of tokens."""
        known = math.prod(dim for dim in shape if dim != -1)
        tokens = math.prod(self._dims[source]) // known
        result = self._value([tokens if dim == -1 else dim for dim in shape])
        self._node(
            "XNNStaticReshape",
            num_dims=len(shape),
            new_shape=[0 if dim == -1 else dim for dim in shape],
            input_id=source,
            output_id=result,
        )
        return result

    def columns(self, source: int, start: int, stop: int) -> int:
        """Emits a slice ``[start:stop]`` of the last dimension."""
        dims = [*self._dims[source][:-1], stop - start]
        result = self._value(dims)
        self._node(
            "XNNStaticSlice",
            num_dims=len(dims),
            offsets=[0] * (len(dims) - 1) + [start],
            sizes=[0] * (len(dims) - 1) + [stop - start],  # 0 takes the whole dimension
            input_id=source,
            output_id=result,
        )
        return result

    def concatenate(self, parts: Sequence[int], axis: int = -1) -> int:
        """Emits the concatenation of two or three values along a dimension, by default the last."""
        dims = list(self._dims[parts[0]])
        dims[axis] = sum(self._dims[part][axis] for part in parts)
        result = self._value(dims)
        ids = [*parts, *[_NOT_EXTERNAL] * (5 - len(parts))]
        self._node(
            f"XNNConcatenate{len(parts)}",
            None,
            axis=axis % len(dims),
            output_id=result,
            **{f"input{i + 1}_id": value for i, value in enumerate(ids)},
        )
        return result

    def linear(self, source: int, filter: int, bias: int | None = None) -> int:
        """Emits ``source @ filter.T + bias`` with a float32 result."""
        result = self._value([*self._dims[source][:-1], self._dims[filter][0]])
        self._node(
            "XNNFullyConnected",
            input1_id=source,
            filter_id=filter,
            bias_id=_NOT_EXTERNAL if bias is None else bias,
            output_id=result,
        )
        return result

    def depthwise(self, source: int, name: str, columns: int, width: int, bias: int | None) -> int:
        """Emits a convolution of each column over ``width`` neighbouring rows, without padding.

        XNNPACK wants the weight ``[width, columns]``; it is stored so under ``NAME taps``.

        Args:
            source: ``float32[1, t + width - 1, columns]``.
            name: the weight's name, ``float32[columns, width]`` in the store.
            columns: the number of columns.
            width: the number of rows that each result reads.
            bias: what is added to each column; None for nothing.

        Returns:
            ``float32[1, t, columns]``.
        """
        taps = self._store.part(name, "value").float().numpy().T
        filter = self._array(f"{name} {TAPS}", taps.reshape(1, 1, width, columns))
        return self._convolved(source, filter, bias)

    def previous(self, source: int) -> int:
        """Emits all rows but the last, as a convolution: ``[1, t + 1, n] -> [1, t, n]``."""
        columns = self._dims[source][2]
        taps = np.repeat(np.array([[1.0], [0.0]], np.float32), columns, 1)
        filter = self._array(f"previous of {columns}", taps.reshape(1, 1, 2, columns))
        return self._convolved(source, filter, None)

    def _convolved(self, source: int, filter: int, bias: int | None) -> int:
        """Emits the convolution of rows by a filter ``[1, 1, width, columns]``."""
        rows, (width, columns) = self._dims[source][1], self._dims[filter][2:]
        image = self.reshape(source, [1, 1, -1, columns])
        result = self._value([1, 1, rows - width + 1, columns])
        fields = {
            **dict.fromkeys((f"padding_{side}" for side in ("top", "right", "bottom", "left")), 0),
            **dict.fromkeys(("subsampling_height", "subsampling_width"), 1),
            **dict.fromkeys(("dilation_height", "dilation_width"), 1),
            **dict.fromkeys(("group_input_channels", "group_output_channels"), 1),
            "kernel_height": 1,
            "kernel_width": width,
            "groups": columns,
            "input1_id": image,
            "filter_id": filter,
            "bias_id": _NOT_EXTERNAL if bias is None else bias,
            "output_id": result,
        }
        self._node("XNNDepthwiseConv2d", None, **fields)
        return self.reshape(result, [1, -1, columns])

    def quantized_linear(
        self, source: int, name: str, format: IntFormat, rows: int, bias: int | None = None
    ) -> int:
        """Emits a product with an integer weight; it rounds each token's activations to 8 bits."""
        return self.linear(self._per_token(source), self._integers(name, format, rows), bias)

    def exact_linear(self, source: int, name: str, format: IntFormat, rows: int) -> int:
        """Emits a product with an integer weight that keeps its activations float32.

        XNNPACK has such kernels only for one scale a row. So a weight with groups becomes one
        weight for each group of columns, ``NAME codes 0`` and so on, and their products are added.
        These kernels would multiply a bias by the scales, too, so that they are given none.
        """
        if format.group_size is None:
            return self.linear(source, self._integers(name, format, rows))
        size = format.group_size
        total: int | None = None
        for group in range(self._store.extents(name)["scale"].shape[1]):
            begin = group * size
            data = self._stored(f"{name} codes {group}", self._group_codes(name, rows, group, size))
            where = {
                "scale": [],
                "channel_dim": 0,
                "scale_buffer_idx": self._stored(
                    f"{name} scale {group}", self._group_scale(name, rows, group)
                ),
                "num_scales": rows,
            }
            weight = self._value([rows, size], QCINT4, data, Record("PerChannelQuant", where))
            product = self.linear(self.columns(source, begin, begin + size), weight)
            total = product if total is None else self.binary("XNNAdd", total, product)
        assert total is not None
        return total

    def _group_codes(self, name: str, rows: int, group: int, size: int) -> Blob:
        """The 4-bit codes of one group of columns."""
        store, width = self._store, size // 2
        begin, end = group * width, (group + 1) * width

        def make() -> bytes:
            return store.part(name, "codes")[:, begin:end].contiguous().numpy().tobytes()

        return Blob(Made(store.extents(name)["codes"], (begin, end), rows * width, make))

    def _group_scale(self, name: str, rows: int, group: int) -> Blob:
        """The scale of each row in one group of columns, as float32."""
        store = self._store

        def make() -> bytes:
            return store.part(name, "scale")[:, group].float().numpy().tobytes()

        return Blob(Made(store.extents(name)["scale"], (group, group + 1), rows * 4, make))

    def parted_linear(
        self,
        source: int,
        name: str,
        format: IntFormat,
        rows: int,
        kept: Sequence[int],
        bias: int | None = None,
    ) -> int:
        """Emits a product that rounds activations to 8 bits except those of some columns.

        The kept columns are selected by a product with rows of 0 and a single 1, which is exact,
        because XNNPACK has no gather. Their weights are stored a second time, as float32, under
        ``float values of NAME``.

        Args:
            source: the activations.
            name: the weight's name.
            format: the weight's format.
            rows: the number of the weight's rows.
            kept: the columns whose activations stay float32 (`exporters.float_columns`).
            bias: what is added to the product; None for nothing.
        """
        width, columns = self._dims[source][-1], list(kept)
        rounded = np.ones(width, np.float32)
        rounded[columns] = 0
        select = np.zeros((len(columns), width), np.float32)
        select[range(len(columns)), columns] = 1
        values = column_values(self._store, name, format, columns).numpy()
        large = self.linear(source, self._array(f"float columns of {name}", select))
        exact = self.linear(large, self._array(f"float values of {name}", values))
        rest = self.binary("XNNMultiply", source, self._array(f"other columns of {name}", rounded))
        rounded_part = self.quantized_linear(rest, name, format, rows, bias)
        return self.binary("XNNAdd", rounded_part, exact)

    def _array(self, key: str, values: npt.NDArray[np.float32]) -> int:
        """Adds a float32 array that is not a weight, under a key that describes it."""
        if key not in self._constants:
            data = self._stored(key, Blob(np.ascontiguousarray(values).tobytes()))
            self._constants[key] = self._value(values.shape, data=data)
        return self._constants[key]

    def _per_token(self, source: int) -> int:
        if source not in self._quantized:
            per_token = Record("PerTokenDynamicQuant", {"num_nonbatch_dims": 1})
            result = self._value(self._dims[source], QDINT8, quantization=per_token)
            self._node("XNNConvert", input_id=source, output_id=result)
            self._quantized[source] = result
        return self._quantized[source]

    def _integers(self, name: str, format: IntFormat, rows: int) -> int:
        """Adds a weight's codes and scales under ``NAME codes`` and ``NAME scale``.

        XNNPACK's 4-bit codes have the store's layout. Its 8-bit codes are signed. Scales of groups
        are bfloat16, and scales of rows are float32.
        """
        extents = self._store.extents(name)
        grouped = format.group_size is not None
        codes = Blob(extents["codes"], SIGNED if format.bits == 8 else None)
        scale = Blob(extents["scale"], None if grouped else WIDENED)
        data = self._stored(f"{name} codes", codes)
        where = {
            "scale": [],
            "channel_dim": 0,
            "scale_buffer_idx": self._stored(f"{name} scale", scale),
            "num_scales": math.prod(extents["scale"].shape),
        }
        if grouped:
            quantization = Record(
                "PerChannelGroupQuant", {**where, "group_size": format.group_size}
            )
        else:
            quantization = Record("PerChannelQuant", where)
        columns = extents["codes"].shape[1] * 8 // format.bits
        datatype = QBINT4 if grouped else QCINT4 if format.bits == 4 else QCINT8
        return self._value([rows, columns], datatype, data, quantization)

    def encode(self) -> bytes:
        """Encodes the delegate's program, as a segment holds it."""
        return encode_graph(
            Record(
                "XNNGraph",
                {
                    "version": "0",
                    "xnodes": self._nodes,
                    "xvalues": self._values,
                    "num_externs": len(self._inputs) + len(self._outputs),
                    "input_ids": self._inputs,
                    "output_ids": self._outputs,
                    "constant_data": self._data,
                },
            )
        )


def encode_graph(record: Record) -> bytes:
    """Encodes an ``XNNGraph`` as a segment holds it."""
    graph = XNNPACK.encode(record)
    end = HEADER.size + len(graph)
    padding = -end % 16
    header = HEADER.pack(
        bytes(4), HEADER_MAGIC, _HEADER_LENGTH, HEADER.size, len(graph), end + padding, 0
    )
    return header + graph + bytes(padding)


def tensor_record(number: int, dims: Sequence[int], data: int = 0) -> Record:
    """A float32 value of a graph, or a constant of it.

    Args:
        number: the value's number.
        dims: its shape, for the largest number of tokens.
        data: the number of the constant's data; 0 for a value.
    """
    tensor = Record("XNNTensorValue", _tensor_fields(number, dims, FP32, data))
    return Record("XValue", {"xvalue_union": tensor})


def named_constant(key: str, nbytes: int) -> Record:
    """The data of a constant that the file holds under a key."""
    return Record("ConstantDataOffset", {"offset": _BY_KEY, "size": nbytes, "named_key": key})


def _tensor_fields(number: int, dims: Sequence[int], datatype: int, data: int) -> dict[str, object]:
    return {
        "datatype": datatype,
        "num_dims": len(dims),
        "dims": list(dims),
        "constant_buffer_idx": data,
        "external_id": _NOT_EXTERNAL,
        "flags": 0,
        "id_out": number,
    }


def _aligned(first: tuple[int, ...], second: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs the dimensions from the last one on, as broadcasting does."""
    count = max(len(first), len(second))
    ones = (1,) * count
    return list(zip((*ones[len(first) :], *first), (*ones[len(second) :], *second), strict=True))
