"""Every stored weight of a .pte as the file itself describes it, whichever exporter wrote it.

The names of weights are not used, because ExecuTorch's own exporter does not keep them. A tensor is
described by its reader, which is a delegate or a kernel that looks rows up, and by the datatype,
shape and groups that the reader states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from exporters.damaged_files import one_sentence
from exporters.executorch import xnnpack_graph
from exporters.executorch.blobs import flip_sign, narrow_to_bfloat16, swap_nibbles
from exporters.executorch.flatbuffer import Record
from exporters.executorch.method import BACKEND, SCALAR_TYPES
from exporters.executorch.reader import Pte, StoredPart, external_place, tensor_bytes

_XNNPACK: Final = {
    xnnpack_graph.FP32: "fp32",
    xnnpack_graph.FP16: "fp16",
    xnnpack_graph.QCINT8: "int8",
    xnnpack_graph.QCINT4: "int4",
    xnnpack_graph.QBINT4: "int4",
}
_BFLOAT16 = SCALAR_TYPES["bfloat16"][0]
_FLOATS: Final = {
    SCALAR_TYPES["float32"][0]: "fp32",
    SCALAR_TYPES["float16"][0]: "fp16",
    _BFLOAT16: "bf16",
}
_LOOKUPS: Final = {
    "quantized_decomposed::embedding_4bit": "int4",
    "quantized_decomposed::embedding_byte": "int8",
    "aten::embedding": None,
}


@dataclass(frozen=True)
class Stored(StoredPart):
    """Bytes of a file, and the key by which the program refers to them.

    Attributes:
        key: the name of the data, or ``constant N``.
    """

    key: str = ""


@dataclass(frozen=True)
class FileTensor:
    """A stored weight.

    Attributes:
        reader: the name of the delegate's backend or of the kernel that reads it.
        datatype: ``int4``, ``int8``, ``fp32``, ``fp16`` or ``bf16``.
        group_size: the number of columns that share a scale; None for one group a row, 0 for a
            tensor without scales.
        shape: the shape that the reader states.
        parts: ``codes`` and ``scale``, or ``value``.
    """

    reader: str
    datatype: str
    group_size: int | None
    shape: tuple[int, ...]
    parts: Mapping[str, Stored]

    @property
    def format(self) -> str:
        """The format's name, as in `quant.formats.formats`."""
        if self.group_size == 0:
            return self.datatype
        return f"{self.datatype}-" + ("pc" if self.group_size is None else f"g{self.group_size}")

    @property
    def nbytes(self) -> int:
        """The size in the file with its scales, in bytes."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def key(self) -> tuple[str, ...]:
        """The keys of its parts, which differ for tensors that are stored in different places."""
        return tuple(part.key for part in self.parts.values())


def file_tensors(pte: Pte) -> tuple[FileTensor, ...]:
    """Every weight of a .pte, once for each reader's name, in the order of first use.

    Raises:
        ExportError: the program names data that the file does not hold.
    """
    found: dict[tuple[str, tuple[str, ...]], FileTensor] = {}
    with one_sentence(pte.file, "an ExecuTorch program with its weights"):
        for tensor in (*_delegate_tensors(pte), *_outside(pte)):
            found.setdefault((tensor.reader, tensor.key), tensor)
    return tuple(found.values())


def _delegate_tensors(pte: Pte) -> Iterator[FileTensor]:
    for graph in pte.delegates.values():
        yield from graph_tensors(pte, graph)


def graph_tensors(pte: Pte, graph: Record) -> Iterator[FileTensor]:
    """The weights of one XNNPACK graph of a .pte."""
    named, data = pte.named(), graph["constant_data"]

    def stored(index: int, restore: Callable[[bytes], bytes] | None) -> Stored:
        key = data[index]["named_key"]
        return Stored(*named[key], restore, key)

    for row in graph["xvalues"]:
        value, quantization = row["xvalue_union"], None
        if value.table == "XNNQuantizedTensorValue":
            value, quantization = value["tensor_value"], value["quant_params"]
        index, shape = value["constant_buffer_idx"], tuple(value["dims"])
        if not index:
            continue
        datatype = _XNNPACK[value["datatype"]]
        size: int | None = 0
        if quantization is None:
            parts = {"value": stored(index, None)}
        else:
            grouped = quantization.table == "PerChannelGroupQuant"
            size = quantization["group_size"] if grouped else None
            if size == shape[-1]:
                size = None  # one group a row
            scale, narrow = quantization["scale_buffer_idx"], narrow_to_bfloat16
            parts = {
                "codes": stored(index, flip_sign if datatype == "int8" else None),
                "scale": stored(scale, None if grouped else narrow),
            }
        yield FileTensor(BACKEND, datatype, size, shape, parts)


def _outside(pte: Pte) -> Iterator[FileTensor]:
    """Tables in which kernels look rows up, and constants that a method gives to a delegate."""
    for plan in pte.program["execution_plan"]:
        values, operators = plan["values"], plan["operators"]
        for chain in plan["chains"]:
            for row in chain["instructions"]:
                call = row["instr_args"]
                if call.table == "KernelCall":
                    name = operators[call["op_index"]]["name"]
                    if name in _LOOKUPS:
                        yield _table(pte, name, [values[i]["val"] for i in call["args"][:2]])
                elif call.table == "DelegateCall":
                    backend = plan["delegates"][call["delegate_index"]]["id"]
                    for tensor in (values[i]["val"] for i in call["args"]):
                        if (
                            tensor.table == "Tensor"
                            and tensor["data_buffer_idx"]
                            and tensor["scalar_type"] in _FLOATS
                        ):
                            yield _whole(pte, f"{backend} input", tensor)


def _whole(pte: Pte, reader: str, tensor: Record) -> FileTensor:
    kind, shape = _FLOATS[tensor["scalar_type"]], tuple(tensor["sizes"])
    return FileTensor(reader, kind, 0, shape, {"value": _constant(pte, tensor, None)})


def _table(pte: Pte, kernel: str, given: list[Record]) -> FileTensor:
    table, scale = given
    datatype = _LOOKUPS[kernel]
    if datatype is None:
        return _whole(pte, kernel, table)
    rows, width = table["sizes"]
    columns = width * (2 if datatype == "int4" else 1)
    groups = scale["sizes"][1] if len(scale["sizes"]) > 1 else 1
    narrow = None if scale["scalar_type"] == _BFLOAT16 else narrow_to_bfloat16
    parts = {
        "codes": _constant(pte, table, swap_nibbles if datatype == "int4" else flip_sign),
        "scale": _constant(pte, scale, narrow),
    }
    size = None if groups == 1 else columns // groups
    return FileTensor(kernel, datatype, size, (rows, columns), parts)


def _constant(pte: Pte, tensor: Record, restore: Callable[[bytes], bytes] | None) -> Stored:
    kind, shape = tensor["scalar_type"], tuple(tensor["sizes"])
    nbytes = tensor_bytes(tensor)
    extra = tensor["extra_tensor_info"]
    if extra and extra["location"]:
        name = extra["fully_qualified_name"]
        return Stored(*external_place(pte, name, kind, shape, nbytes), restore, name)
    where, index = pte.program["constant_segment"], tensor["data_buffer_idx"]
    begin, total = pte.segments[where["segment_index"]]
    offset = where["offsets"][index]
    if not index or offset + nbytes > total:
        raise LookupError(f"constant {index} lies past its segment")
    return Stored(pte.file, begin + offset, nbytes, restore, f"constant {index}")
