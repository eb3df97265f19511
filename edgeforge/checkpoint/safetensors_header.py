"""Reads and checks the header of a safetensors file without mapping the file.

Format: a u64 little-endian header length, a JSON object ``name -> {dtype, shape, data_offsets}``
with an optional ``__metadata__`` of strings, then the data. The tensors must cover the data without
overlaps, without holes, and with nothing after the last one.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgeforge.checkpoint.json_text import parse_object, reason, refuse_git_lfs_pointer
from edgeforge.checkpoint.tensor_entry import (
    MAX_DIMENSIONS,
    MAX_TENSORS_PER_FILE,
    TensorEntry,
    count_elements,
)
from edgeforge.errors import CheckpointError
from quant.input_files import open_input

MAX_HEADER_BYTES = 100_000_000

_DTYPES: dict[str, tuple[str, int]] = {  # safetensors' name: our name, bits per element
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1", 4),
}


def read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a safetensors file, in file order.

    Raises:
        CheckpointError: The file cannot be read, is cut short, or its header is not sound.
    """
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            refuse_git_lfs_pointer(path, start)
            if len(start) < 8:
                raise CheckpointError(
                    f"{path} has {size} bytes, too few for a safetensors file: "
                    "the download was probably cut short"
                )
            length = int.from_bytes(start[:8], "little")
            _check_length(path, length, size, start)
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if len(header) < length:
        raise CheckpointError(f"{path} became shorter while its header was read")
    fields = parse_object(header, f"the header of {path}", strict=True)
    _check_metadata(path, fields.pop("__metadata__", None))
    if len(fields) > MAX_TENSORS_PER_FILE:
        raise CheckpointError(
            f"the header of {path} lists {len(fields)} tensors; "
            f"EdgeForge reads at most {MAX_TENSORS_PER_FILE} per file"
        )
    entries = [_entry(path, name, value, 8 + length) for name, value in fields.items()]
    _check_tiling(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _check_length(path: Path, length: int, size: int, start: bytes) -> None:
    if length > MAX_HEADER_BYTES:
        hint = "is not a safetensors file" if start[8:9] != b"{" else "is damaged"
        raise CheckpointError(
            f"{path} {hint}: its first 8 bytes claim a header of {length} bytes, "
            f"and at most {MAX_HEADER_BYTES} are allowed"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes but only {size - 8} bytes follow: "
            "the download was probably cut short"
        )


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"the header of {path} is not sound: __metadata__ must map strings to strings"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    where = f"the header of {path} is not sound: tensor {name[:200]!r}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not described by an object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in value:
            raise CheckpointError(f"{where} has no {key}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{where} has the unknown dtype {str(dtype)[:40]!r}; known are {', '.join(_DTYPES)}"
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where} has a shape that is not a list of counts")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where} has data_offsets that are not two counts")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where} begins at byte {begin}, past its end at byte {end}")
    elements = count_elements(shape)
    if elements is None:
        raise CheckpointError(f"{where} has a shape too large to address: {shape}")
    kind, bits = _DTYPES[dtype]
    if elements * bits != (end - begin) * 8:
        raise CheckpointError(
            f"{where} is {dtype} of shape {shape}, which takes {-(-elements * bits // 8)} bytes, "
            f"but its data_offsets span {end - begin}"
        )
    return TensorEntry(name, kind, tuple(shape), path, data_start + begin, end - begin)


def _check_tiling(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position, previous = data_start, "the header"
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != position:
            gap = entry.offset - position
            if data_start + gap > size and entry.offset > size:
                fault = f"begins {entry.offset - size} bytes past the end of the file"
            elif gap < 0:
                fault = f"overlaps {previous[:200]} by {-gap} bytes"
            else:
                fault = f"leaves a hole of {gap} unused bytes after {previous[:200]}"
            raise CheckpointError(
                f"the header of {path} is not sound: tensor {entry.name[:200]!r} {fault}"
            )
        position, previous = entry.offset + entry.nbytes, repr(entry.name)
    if position > size:
        raise CheckpointError(
            f"{path} is {position - size} bytes short of the {position} its header promises: "
            "the download was probably cut short"
        )
    if position < size:
        raise CheckpointError(
            f"{path} has {size - position} bytes after its last tensor that no tensor claims"
        )
