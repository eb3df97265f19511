"""Reads integers and scales back from a written .onnx, to compare them with the store's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.onnx.model_file import external_place, load_graph
from exporters.stored_digests import digests_of
from quant.input_files import open_input

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# The part of a weight that an initializer of this exporter holds, by the suffix of its name.
_PARTS = {
    ".blocks": "codes",
    ".rows": "codes",
    ".scale_bf16": "scale",
    ".scale_f16": "scale",
    ".zero": "zero_point",
    ".input_scale_bf16": "input_scale",
    ".stored": "value",
    "": "value",
}
# The weight whose name an initializer's begins with.
WEIGHT: Final = re.compile(r".*?\.(?:weight|bias)(?=\.|$)")
# Bits, and how many blocks repeat the one zero point of a row, which the store holds once.
_REPEATED_ZERO = re.compile(r"\.zero_([248])x([0-9]{1,9})")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StoredPart:
    """Where an initializer's bytes are: in the graph, or in an external data file.

    Attributes:
        data: the bytes when the graph holds them; empty otherwise.
        file: the external data file; None when the graph holds the bytes.
        offset: where the bytes begin in that file.
        nbytes: how many bytes there are.
    """

    data: bytes
    file: Path | None
    offset: int
    nbytes: int

    def blocks(self) -> Iterator[bytes]:
        """Yields the bytes, one block at a time.

        Raises:
            ExportError: the file is missing or too short.
        """
        if self.file is None:
            yield self.data
            return
        left = self.nbytes
        try:
            with open_input(self.file) as stream:
                stream.seek(self.offset)
                while left:
                    block = stream.read(min(_BLOCK, left))
                    if not block:
                        raise ExportError(f"{self.file} is {left} bytes too short")
                    left -= len(block)
                    yield block
        except OSError as error:
            raise ExportError(f"{self.file} cannot be read: {error.strerror}") from error


Parts = dict[str, list[StoredPart]]
"""The places of each part of a weight; graphs that hold a small part inline give several."""


def read_parts(graph: Path) -> dict[str, Parts]:
    """Finds the parts of every weight among the graph's initializers, by weight name.

    Raises:
        ExportError: the file is no ONNX model, or its external data file is missing or too short.
    """
    model = load_graph(graph)
    with one_sentence(graph, "an ONNX model"):
        return _parts_of(model, graph)


def _parts_of(model: ModelProto, graph: Path) -> dict[str, Parts]:
    import onnx

    weights: dict[str, dict[str, dict[StoredPart, None]]] = {}
    for tensor in model.graph.initializer:
        found = WEIGHT.match(tensor.name)
        suffix = tensor.name[found.end() :] if found else ""
        repeated = _REPEATED_ZERO.fullmatch(suffix)
        if found is None or (suffix not in _PARTS and repeated is None):
            continue
        stored = stored_part(tensor, graph)
        if repeated is not None:
            part, stored = "zero_point", _once(stored, int(repeated[1]), int(repeated[2]))
        elif suffix == ".rows" and tensor.data_type != onnx.TensorProto.UINT8:
            part = "value"
        else:
            part = _PARTS[suffix]
        weights.setdefault(found[0], {}).setdefault(part, {})[stored] = None
    return {
        name: {part: list(places) for part, places in parts.items()}
        for name, parts in weights.items()
    }


def stored_part(tensor: TensorProto, graph: Path) -> StoredPart:
    """Where the bytes of an initializer are."""
    if not tensor.external_data:
        return StoredPart(tensor.raw_data, None, 0, len(tensor.raw_data))
    return StoredPart(b"", *external_place(tensor, graph))


def _once(stored: StoredPart, bits: int, count: int) -> StoredPart:
    """Keeps one of the ``count`` equal zero points of each row, as the store holds them.

    Where those of a row differ, it returns all bytes, so that the digest differs from the store's.
    """
    data = b"".join(stored.blocks())
    width = -(-count * bits // 8)
    if width < 1 or len(data) % width:
        return StoredPart(data, None, 0, len(data))
    once = bytearray()
    for start in range(0, len(data), width):
        zero = data[start] & (1 << bits) - 1
        whole = sum(zero << shift for shift in range(0, 8, bits))
        row = bytearray([whole]) * width
        row[-1] &= (1 << (count * bits - 1) % 8 + 1) - 1
        if row != data[start : start + width]:
            return StoredPart(data, None, 0, len(data))
        once.append(zero)
    return StoredPart(bytes(once), None, 0, len(once))


def stored_digests(*graphs: Path) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of every weight from the written files alone.

    When the files hold a weight in several places and these differ, its text lists every digest
    found, so that it equals no digest of the store.

    Args:
        graphs: the ONNX files; they may share weights.

    Raises:
        ExportError: a file is missing, too short, or no ONNX model.
    """
    weights: dict[str, Parts] = {}
    for graph in graphs:
        for name, parts in read_parts(graph).items():
            for part, places in parts.items():
                known = weights.setdefault(name, {}).setdefault(part, [])
                known[:] = dict.fromkeys([*known, *places])
    files = {*graphs}
    for weight in weights.values():
        files |= {each.file for places in weight.values() for each in places if each.file}
    return digests_of(weights, graphs[0].parent, sum(file.stat().st_size for file in files))
