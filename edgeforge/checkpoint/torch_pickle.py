"""Finds the tensors of a ``pytorch_model.bin`` without unpickling it.

``torch.save`` writes a zip whose members are stored uncompressed: ``data.pkl`` describes the
tensors and ``data/<key>`` holds each storage's bytes. `edgeforge.checkpoint.pickle_machine`
interprets the pickle's opcodes and builds only dicts, lists, tuples, numbers, texts and
descriptions of tensors. It cannot import or call anything, so a checkpoint cannot run code.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

from edgeforge.checkpoint.json_text import reason, refuse_git_lfs_pointer
from edgeforge.checkpoint.pickle_machine import StoredTensor, Unsound, interpret
from edgeforge.checkpoint.tensor_entry import MAX_TENSORS_PER_FILE, TensorEntry, count_elements
from edgeforge.errors import CheckpointError
from quant.input_files import open_input
from quant.quoted import quoted

MAX_PICKLE_BYTES = 16 << 20

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # Signature, name length, extra length.


def read_torch_file(path: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a file written by ``torch.save(state_dict)``, in the dict's order.

    Raises:
        CheckpointError: The file is not such a zip file or is cut short, its pickle names anything
            but plain tensors, or a tensor's elements do not lie contiguously in the file.
    """
    try:
        size = os.path.getsize(path)
        with open_input(path) as file:
            start = file.read(64)
        refuse_git_lfs_pointer(path, start)
        if start[:1] == b"\x80":
            raise CheckpointError(
                f"{path} is a bare pickle, as torch wrote before version 1.6, and loading it could "
                "run code: ask for a safetensors file"
            )
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            prefix = _archive_prefix(path, members)
            pickle = _read_member(path, archive, members[f"{prefix}/data.pkl"])
            order = members.get(f"{prefix}/byteorder")
            if order is not None and _read_member(path, archive, order).strip() != b"little":
                raise CheckpointError(
                    f"{path} was written on a big-endian machine; EdgeForge reads little-endian "
                    "files only"
                )
        try:
            tensors = _tensors(interpret(pickle))
            with open_input(path) as file:
                return {
                    name: _entry(path, name, tensor, members, prefix, file.fileno(), size)
                    for name, tensor in tensors.items()
                }
        except Unsound as error:
            raise CheckpointError(f"{path} is refused: {error}") from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is not a whole torch zip file ({error}): the download was probably cut short"
        ) from None
    except (NotImplementedError, RuntimeError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a zip file as torch writes it: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def _archive_prefix(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    found = [name[: -len("/data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CheckpointError(
            f"{path} is a zip file with {len(found)} members named data.pkl where torch writes one"
        )
    return found[0]


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    _check_stored(path, info)
    if info.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path} has a {info.filename} of {info.file_size} bytes; "
            f"EdgeForge reads at most {MAX_PICKLE_BYTES}"
        )
    return archive.read(info)


def _check_stored(path: Path, info: zipfile.ZipInfo) -> None:
    stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    if not stored or info.file_size != info.compress_size:
        raise CheckpointError(
            f"{path} has the compressed or encrypted member {quoted(info.filename)}; "
            "torch stores members as they are"
        )


def _tensors(table: object) -> dict[str, StoredTensor]:
    if not isinstance(table, dict):
        kind = type(table).__name__.lower()
        raise Unsound(f"it holds a {kind}, not a dict of tensors")
    found = {name: value for name, value in table.items() if isinstance(value, StoredTensor)}
    if not found or not all(isinstance(name, str) for name in found):
        raise Unsound("it holds no tensors by name; EdgeForge reads a state dict")
    if len(found) > MAX_TENSORS_PER_FILE:
        raise Unsound(
            f"it lists {len(found)} tensors; EdgeForge reads at most {MAX_TENSORS_PER_FILE}"
        )
    return found


def _entry(
    path: Path,
    name: str,
    tensor: StoredTensor,
    members: dict[str, zipfile.ZipInfo],
    prefix: str,
    descriptor: int,
    size: int,
) -> TensorEntry:
    where = f"tensor {name[:200]!r}"
    storage = tensor.storage
    elements = count_elements(tensor.shape)
    if elements is None:
        raise Unsound(f"{where} has a shape too large to address: {tensor.shape}")
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if length != 1 and stride != expected and elements:
            raise Unsound(
                f"{where} is not contiguous (shape {tensor.shape}, stride {tensor.stride}): save "
                "it again after .contiguous(), as safetensors if you can"
            )
        expected *= length
    info = members.get(f"{prefix}/data/{storage.key}")
    if info is None:
        raise Unsound(f"the data of {where} is not in the file")
    _check_stored(path, info)
    if elements and tensor.offset + elements > storage.elements:
        raise Unsound(f"{where} reaches past the end of its storage")
    if storage.elements * storage.itemsize > info.file_size:
        raise Unsound(
            f"{where} has a storage of {storage.elements * storage.itemsize} bytes in a member of "
            f"{info.file_size}"
        )
    header = os.pread(descriptor, _LOCAL_HEADER.size, info.header_offset)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise Unsound(f"the data of {where} is not where the zip file's directory says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    data = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if data + info.file_size > size:
        raise Unsound(f"the data of {where} reaches past the end of the file")
    offset = data + tensor.offset * storage.itemsize if elements else data
    return TensorEntry(name, storage.dtype, tensor.shape, path, offset, elements * storage.itemsize)
