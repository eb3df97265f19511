"""Reads integers and scales back out of a written .onnx, to hold them against the store's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.errors import ExportError
from quant.store import weight_digest

if TYPE_CHECKING:
    from onnx import TensorProto

# What this exporter's initializers hold of a weight, by the end of their names.
_PARTS = {
    ".blocks": "codes",
    ".rows": "codes",
    ".scale_bf16": "scale",
    ".zero": "zero_point",
    # One zero point a row, repeated for every block: its first column is the store's.
    ".zero_blocks4": "zero_point",
    ".zero_blocks8": "zero_point",
    ".stored": "value",
    "": "value",
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StoredPart:
    """Where an initializer's bytes are: inline, or in a file.

    Attributes:
        data: the bytes when they are inline.
        file: the external data file otherwise.
        offset: where they begin there.
        nbytes: how many there are.
    """

    data: bytes
    file: Path | None
    offset: int
    nbytes: int

    def blocks(self) -> Iterator[bytes]:
        """The bytes, a block at a time.

        Raises:
            ExportError: the file is missing or too short.
        """
        if self.file is None:
            yield self.data
            return
        left = self.nbytes
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.offset)
                while left:
                    block = stream.read(min(_BLOCK, left))
                    if not block:
                        raise ExportError(f"{self.file} is {left} bytes too short")
                    left -= len(block)
                    yield block
        except OSError as error:
            raise ExportError(f"{self.file} cannot be read: {error.strerror}") from error


def read_parts(graph: Path) -> dict[str, dict[str, StoredPart]]:
    """Parts by weight name, as the graph's initializers hold them.

    Raises:
        ExportError: the file is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(graph), load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise ExportError(f"{graph} cannot be read as an ONNX model: {error}") from error
    weights: dict[str, dict[str, StoredPart]] = {}
    for tensor in model.graph.initializer:
        weight, _, suffix = tensor.name.partition(".weight")
        if not _ or suffix not in _PARTS:
            continue
        part = _PARTS[suffix]
        if suffix == ".rows" and tensor.data_type != onnx.TensorProto.UINT8:
            part = "value"
        stored = _stored(tensor, graph.parent)
        if suffix.startswith(".zero_blocks"):
            stored = _first_column(stored, tensor.dims[1], 15 if suffix.endswith("4") else 255)
        weights.setdefault(weight + ".weight", {})[part] = stored
    return weights


def _stored(tensor: TensorProto, folder: Path) -> StoredPart:
    if not tensor.external_data:
        return StoredPart(tensor.raw_data, None, 0, len(tensor.raw_data))
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, nbytes = int(place.get("offset", 0)), int(place["length"])
    return StoredPart(b"", folder / place["location"], offset, nbytes)


def _first_column(stored: StoredPart, columns: int, mask: int) -> StoredPart:
    data = b"".join(stored.blocks())[::columns]
    return StoredPart(bytes(byte & mask for byte in data), None, 0, len(data))


def stored_digests(graph: Path) -> dict[str, str]:
    """`quant.store.weight_digest` of every weight, from the written files alone.

    Raises:
        ExportError: a file is missing, too short, or no ONNX model.
    """
    weights = read_parts(graph)

    def digest(parts: dict[str, StoredPart]) -> str:
        return weight_digest({part: stored.blocks() for part, stored in parts.items()})

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(weights, pool.map(digest, weights.values()), strict=True))
