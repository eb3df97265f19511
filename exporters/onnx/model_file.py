"""Opens an ONNX model's graph and finds its external data, without reading any weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from quant.input_files import is_inside, read_input, require_regular
from quant.quoted import quoted

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

LARGEST_GRAPH: Final = 2**31 - 1  # what protobuf can parse


def load_graph(path: Path) -> ModelProto:
    """Reads a graph; its external data stays where it is.

    Raises:
        ExportError: the file is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    with one_sentence(path, "an ONNX model"):
        try:
            return onnx.ModelProto.FromString(read_input(path, LARGEST_GRAPH))
        except DecodeError as error:
            raise ExportError(f"{path} cannot be read as an ONNX model: {error}") from error


def external_place(tensor: TensorProto, graph: Path) -> tuple[Path, int, int]:
    """Where a tensor's external data is: the file, the offset and the size in bytes.

    Raises:
        ExportError: the file is missing, is outside the graph's folder, or does not hold the place.
    """
    where = f"{graph} keeps {quoted(tensor.name)}"
    place = {entry.key: entry.value for entry in tensor.external_data}
    named = place.get("location", "")
    file = graph.parent / named
    if not is_inside(named):
        raise ExportError(
            f"{where} in {quoted(named)}, outside its folder: only data beside the graph is read"
        )
    try:
        inside = any(map(file.resolve().is_relative_to, _roots(graph.parent.resolve())))
        require_regular(file)
        size = file.stat().st_size
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ExportError(f"{file} cannot be read: {reason}") from error
    if not inside:
        raise ExportError(
            f"{where} in {named}, which links out of its folder: copy the file there (cp -L)"
        )
    offset, nbytes = (_count(place, key, where) for key in ("offset", "length"))
    if offset + nbytes > size:
        raise ExportError(
            f"{file} is {offset + nbytes - size} bytes too short: {where} in its bytes {offset} to "
            f"{offset + nbytes}, and one of the two was changed"
        )
    return file, offset, nbytes


def _roots(folder: Path) -> tuple[Path, ...]:
    """The folder; of a snapshot in the hub's cache, also the folder to which its files link."""
    is_snapshot = folder.parent.name == "snapshots"
    return (folder, folder.parents[1] / "blobs") if is_snapshot else (folder,)


def _count(place: dict[str, str], key: str, where: str) -> int:
    text = place.get(key, "0" if key == "offset" else "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ExportError(f"{where} in external data of the {key} {quoted(text)}, which is none")
    return int(text)
