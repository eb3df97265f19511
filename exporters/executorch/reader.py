"""Reads a .pte back: its methods, its delegates, and the integers and scales in its segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.executorch import pte_file, xnnpack_graph
from exporters.executorch.blobs import TAPS, WIDE, flip_sign, narrow_to_bfloat16, swap_nibbles
from exporters.executorch.flatbuffer import Record
from exporters.executorch.method import BACKEND, SCALAR_TYPES
from exporters.executorch.ptd_file import MARK_OF_PTE, Ptd, read_at, read_ptd
from exporters.executorch.pte_file import HEAD_ROWS, ROW_SCALE, ROWS, WIDE_ROW_SCALE, is_weight
from exporters.executorch.schemas import PROGRAM, XNNPACK
from exporters.executorch.segments import check_segments
from exporters.stored_digests import digests_of
from quant.input_files import open_input

_BLOCK = 1 << 20
_WHAT: Final = "an ExecuTorch program"
_ITEM_BYTES: Final = tuple(SCALAR_TYPES.values())
_UINT8, _INT8, _FLOAT32 = (SCALAR_TYPES[name][0] for name in ("uint8", "int8", "float32"))
# The conversion that turns an XNNPACK datatype's bytes into the store's.
_FROM_XNNPACK: Final[dict[int, Callable[[bytes], bytes] | None]] = {
    xnnpack_graph.QCINT8: flip_sign,
    xnnpack_graph.QCINT4: None,
    xnnpack_graph.QBINT4: None,
    xnnpack_graph.FP32: None,
    xnnpack_graph.FP16: None,
}
_UNWIDENED: Final = {WIDE: narrow_to_bfloat16}


@dataclass(frozen=True)
class StoredPart:
    """Where a part of a weight is, and how its bytes become the store's.

    Attributes:
        file: a .pte, or the .ptd beside it.
        offset: the offset in the file, in bytes.
        nbytes: the size in the file, in bytes.
        restore: undoes the file's layout, one block at a time; None when the store's is the same.
    """

    file: Path
    offset: int
    nbytes: int
    restore: Callable[[bytes], bytes] | None = None

    def blocks(self) -> Iterator[bytes]:
        """Yields the bytes as the store holds them, one block at a time."""
        left = self.nbytes
        with open_input(self.file) as stream:
            stream.seek(self.offset)
            while left:
                block = stream.read(min(_BLOCK, left))
                if not block:
                    raise ExportError(f"{self.file} is {left} bytes too short")
                left -= len(block)
                yield self.restore(block) if self.restore else block


@dataclass(frozen=True)
class Pte:
    """An opened .pte.

    Attributes:
        file: its path.
        program: the root table, as `exporters.executorch.schemas` defines it.
        segments: the offset in the file and the size of each segment, in bytes.
        delegates: the XNNPACK graphs, by the number of their segment.
        weights: the .ptd beside it; None when the .pte holds the weights itself.
    """

    file: Path
    program: Record
    segments: Segments
    delegates: dict[int, Record]
    weights: Ptd | None = None

    def named(self) -> dict[str, Place]:
        """The places of the data that delegates ask for, by key."""
        return self._named

    @cached_property
    def _named(self) -> dict[str, Place]:
        rows = _records(self.program, "named_data")
        found = {row["key"]: (self.file, *self.segments[row["segment_index"]]) for row in rows}
        if self.weights is not None:
            found |= {key: (self.weights.file, *at) for key, at in self.weights.named.items()}
        return found


Segments = tuple[tuple[int, int], ...]
"""The offset in the file and the size of each segment, in bytes."""
Place = tuple[Path, int, int]
"""A file, an offset in it, and a number of bytes."""


def read_pte(file: Path) -> Pte:
    """Opens a .pte and the .ptd with its weights, if it has one; it does not read the weights.

    Raises:
        ExportError: a file is missing, cut short, damaged, or has another schema, or the .ptd
            holds other weights.
    """
    with one_sentence(file, _WHAT), open_input(file) as stream:
        program, segments = _read_tables(file, stream)
        delegates: dict[int, Record] = {}
        for plan in _records(program, "execution_plan"):
            for delegate in _records(plan, "delegates"):
                index = delegate["processed"]["index"]
                if index not in delegates and delegate["id"] == BACKEND:
                    stream.seek(segments[index][0])
                    delegates[index] = _read_graph(stream.read(segments[index][1]))
        return Pte(file, program, segments, delegates, _read_weights(file, program, segments))


def read_weights(file: Path) -> Ptd | None:
    """Opens the .ptd that holds a .pte's weights.

    Returns:
        The .ptd; None when the .pte holds its weights itself, and when the .pte is damaged, which
        the runtime reports when it loads the file.

    Raises:
        ExportError: the .ptd is missing, cut short or damaged, or holds other weights.
    """
    try:
        with one_sentence(file, _WHAT), open_input(file) as stream:
            program, segments = _read_tables(file, stream)
    except ExportError:
        return None
    with one_sentence(file, _WHAT):
        return _read_weights(file, program, segments)


def _read_tables(file: Path, stream: BinaryIO) -> tuple[Record, Segments]:
    size = stream.seek(0, 2)
    stream.seek(0)
    start = stream.read(8 + pte_file.HEADER.size)
    magic, _, length, base, total = pte_file.HEADER.unpack_from(start, 8)
    if magic != pte_file.HEADER_MAGIC or start[4:8] != PROGRAM.identifier:
        raise ExportError(
            f"{file} is no ExecuTorch program of the schema "
            f"{PROGRAM.identifier.decode()} with weights in segments"
        )
    if base + total > size:
        raise ExportError(f"{file} was cut short: it has {size} bytes and not {base + total}")
    stream.seek(0)
    program = PROGRAM.decode(stream.read(min(length, size)), "Program")
    segments = tuple((base + row["offset"], row["size"]) for row in _records(program, "segments"))
    check_segments(segments, size)
    return program, segments


def _read_weights(file: Path, program: Record, segments: Segments) -> Ptd | None:
    marks = [
        segments[row["segment_index"]]
        for row in _records(program, "named_data")
        if row["key"] == MARK_OF_PTE
    ]
    if not marks:
        return None
    weights = read_ptd(file.with_suffix(".ptd"))
    if weights.mark() != read_at(file, *marks[0]):
        raise ExportError(
            f"{weights.file} holds weights of another export than {file.name}: replace it by the "
            f"file that was written with {file.name}"
        )
    return weights


def _read_graph(data: bytes) -> Record:
    _, magic, _, start, length, _, _ = xnnpack_graph.HEADER.unpack_from(data)
    if magic != xnnpack_graph.HEADER_MAGIC:
        raise ValueError("a delegate's program is not XNNPACK's")
    return XNNPACK.decode(data[start : start + length], "XNNGraph")


def _records(record: Record, field: str) -> list[Record]:
    rows = record[field]
    if not isinstance(rows, list):
        raise ValueError(f"its {field} are damaged")
    return rows


@dataclass(frozen=True)
class GroupedPart:
    """A part of a weight that the file holds as one matrix for each group of columns.

    Attributes:
        groups: the part of each group, in the order of the columns.
        rows: the number of the weight's rows.
    """

    groups: tuple[StoredPart, ...]
    rows: int

    @property
    def nbytes(self) -> int:
        """The size in the file, in bytes."""
        return sum(part.nbytes for part in self.groups)

    def blocks(self) -> Iterator[bytes]:
        """Yields the bytes as the store holds them, with the groups of each row side by side."""
        pieces = [
            np.frombuffer(b"".join(part.blocks()), np.uint8).reshape(self.rows, -1)
            for part in self.groups
        ]
        yield np.concatenate(pieces, axis=1).tobytes()


@dataclass(frozen=True)
class TransposedPart:
    """A convolution's weight, whose rows and columns the file exchanges.

    Attributes:
        part: its bytes, ``float32[width, columns]``.
        columns: the number of the file's columns.
    """

    part: StoredPart
    columns: int

    @property
    def nbytes(self) -> int:
        """The size in the file, in bytes."""
        return self.part.nbytes

    def blocks(self) -> Iterator[bytes]:
        """Yields the bytes as the store holds them."""
        stored = np.frombuffer(b"".join(self.part.blocks()), np.float32)
        yield stored.reshape(-1, self.columns).T.tobytes()


AnyPart = StoredPart | GroupedPart | TransposedPart
Places = dict[str, dict[str, list[AnyPart]]]
"""The places of each part of each weight; an embedding that is also the head has two."""


def read_parts(pte: Pte) -> Places:
    """Finds the parts of every weight of a .pte, from its delegates and its constants.

    Raises:
        ExportError: a delegate names data that the file does not hold.
    """
    found: dict[str, dict[str, dict[AnyPart, None]]] = {}
    with one_sentence(pte.file, _WHAT):
        named = pte.named()
        for graph in pte.delegates.values():
            for part, weight, stored in _delegate_parts(graph, named):
                found.setdefault(weight, {}).setdefault(part, {})[stored] = None
        for part, weight, constant in _constant_parts(pte):
            found.setdefault(weight, {}).setdefault(part, {})[constant] = None
    return {
        weight: {part: list(places) for part, places in parts.items()}
        for weight, parts in found.items()
    }


def _delegate_parts(graph: Record, named: dict[str, Place]) -> Iterator[tuple[str, str, AnyPart]]:
    data = _records(graph, "constant_data")
    apart: dict[str, dict[int, tuple[StoredPart, StoredPart, int]]] = {}  # by weight and group

    def place(index: int, restore: Callable[[bytes], bytes] | None) -> StoredPart:
        return StoredPart(*named[data[index]["named_key"]], restore)

    for row in _records(graph, "xvalues"):
        value, quantization = row["xvalue_union"], None
        if value.table == "XNNQuantizedTensorValue":
            value, quantization = value["tensor_value"], value["quant_params"]
        index = value["constant_buffer_idx"]
        if not index:
            continue
        weight, _, part = data[index]["named_key"].partition(" ")
        restore = _FROM_XNNPACK[value["datatype"]]
        if quantization is None:
            if part == TAPS:
                yield "value", weight, TransposedPart(place(index, None), value["dims"][-1])
            elif is_weight(weight):
                yield "value", weight, place(index, _UNWIDENED.get(part, restore))
            continue
        grouped = quantization.table == "PerChannelGroupQuant"
        codes = place(index, restore)
        scale = place(quantization["scale_buffer_idx"], None if grouped else narrow_to_bfloat16)
        part, _, group = part.partition(" ")
        if group:
            apart.setdefault(weight, {})[int(group)] = codes, scale, value["dims"][0]
            continue
        yield part, weight, codes
        yield "scale", weight, scale
    for weight, groups in apart.items():
        ordered = [groups[number] for number in range(len(groups))]
        rows = ordered[0][2]
        yield "codes", weight, GroupedPart(tuple(codes for codes, _, _ in ordered), rows)
        yield "scale", weight, GroupedPart(tuple(scale for _, scale, _ in ordered), rows)


_ROW_PARTS: Final = {
    ROWS: "codes",
    HEAD_ROWS: "codes",
    ROW_SCALE: "scale",
    WIDE_ROW_SCALE: "scale",
    "": "value",
    WIDE: "value",
}


def _constant_parts(pte: Pte) -> Iterator[tuple[str, str, StoredPart]]:
    constants = pte.program["constant_segment"]
    if not isinstance(constants, Record):
        raise ValueError("it has no segment of constants")
    begin, total = pte.segments[constants["segment_index"]]
    offsets = constants["offsets"]
    for plan in _records(pte.program, "execution_plan"):
        for row in _records(plan, "values"):
            tensor = row["val"]
            if tensor.table != "Tensor":
                continue
            extra = tensor["extra_tensor_info"]
            external = bool(extra and extra["location"])
            if not external and not tensor["data_buffer_idx"]:
                continue
            name = extra["fully_qualified_name"] if extra else ""
            weight, _, label = (name or "").partition(" ")
            if not is_weight(weight):
                continue
            kind = tensor["scalar_type"]
            nbytes = tensor_bytes(tensor)
            if external:
                where = external_place(pte, name, kind, tuple(tensor["sizes"]), nbytes)
            else:
                offset = offsets[tensor["data_buffer_idx"]]
                if offset + nbytes > total:
                    raise LookupError(f"{name} lies past its segment")
                where = pte.file, begin + offset, nbytes
            restore: Callable[[bytes], bytes] | None = None
            if label == ROWS:
                restore = swap_nibbles if kind == _UINT8 else flip_sign
            elif label in (WIDE, WIDE_ROW_SCALE):
                restore = narrow_to_bfloat16
            yield _ROW_PARTS[label], weight, StoredPart(*where, restore)


def tensor_bytes(tensor: Record) -> int:
    """The size of a tensor's elements, in bytes.

    Raises:
        ValueError: a dimension is negative, or the element type is unknown.
    """
    size = next((size for number, size in _ITEM_BYTES if number == tensor["scalar_type"]), None)
    if size is None or any(dim < 0 for dim in tensor["sizes"]):
        raise ValueError("a tensor has an unknown element type or a negative dimension")
    return int(size * math.prod(tensor["sizes"]))


def external_place(pte: Pte, name: str, kind: int, shape: tuple[int, ...], nbytes: int) -> Place:
    """The place of a tensor that a method reads from the .ptd.

    Raises:
        LookupError: the .ptd does not hold it, or holds it with another dtype or shape.
    """
    if pte.weights is None:
        raise LookupError(f"{name} lies in no file")
    offset, size = pte.weights.named[name]
    if size != nbytes or pte.weights.layouts.get(name) != (kind, shape):
        raise LookupError(f"{pte.weights.file.name} holds {name} in another shape")
    return pte.weights.file, offset, nbytes


def stored_digests(file: Path) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of every weight from the written files alone.

    When the files hold a weight in several places and these differ, its text lists every digest
    found, so that it equals no digest of the store.

    Raises:
        ExportError: a file is missing, cut short, damaged, or has another schema.
    """
    pte = read_pte(file)
    files = [file] if pte.weights is None else [file, pte.weights.file]
    return digests_of(read_parts(pte), file, sum(each.stat().st_size for each in files))
