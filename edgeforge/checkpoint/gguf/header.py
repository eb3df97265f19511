"""Reads and checks the header of a GGUF file without mapping the file.

Format, versions 2 and 3, little-endian: the magic ``GGUF``, u32 version, u64 number of tensors, u64
number of fields; the fields (key, type, value); the tensors (name, dimensions with the innermost
first, type, offset); padding to the alignment; then the data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Final

from edgeforge.checkpoint.gguf.tensor_types import TensorType, find_type
from edgeforge.checkpoint.json_text import reason, refuse_git_lfs_pointer
from edgeforge.checkpoint.tensor_entry import MAX_TENSORS_PER_FILE, TensorEntry, count_elements
from edgeforge.errors import CheckpointError
from quant.input_files import open_input
from quant.quoted import quoted

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

_MAX_FIELDS: Final = 1 << 16
_MAX_STRING: Final = 1 << 24
_MAX_NAME: Final = 1 << 10
# The largest vocabularies have 262,144 tokens, and somewhat more merges.
_MAX_ARRAY: Final = 1 << 23
_MAX_HEADER: Final = 1 << 28
_MAX_DIMENSIONS: Final = 4
_MAX_ALIGNMENT: Final = 1 << 16

_NUMBERS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        fields: the metadata by key.
        tensors: every tensor by its name in the file; ``dtype`` is that of `TensorType`.
        types: each tensor's type.
        start: bytes from the file's start to the tensors' data: the header's length.
    """

    path: Path
    fields: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]
    types: Mapping[str, TensorType]
    start: int


def read_header(path: Path) -> GgufHeader:
    """Returns the header of a GGUF file.

    Raises:
        CheckpointError: the file cannot be read, is cut short, or its header is not sound.
    """
    try:
        with open_input(path) as file:
            return _Reader(path, file).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


class _Reader:
    """Reads a header once, from its beginning to its end."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path, self._file, self._at = path, file, 0
        self._size = os.fstat(file.fileno()).st_size

    def read(self) -> GgufHeader:
        start = self._file.peek(64)[:64]
        refuse_git_lfs_pointer(self._path, start)
        if start[:4] != b"GGUF":
            raise CheckpointError(
                f"{self._path} is not a GGUF file: it begins with {start[:4]!r}, not with b'GGUF'"
            )
        self._bytes(4)
        version = self._number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            what = "is big-endian" if swapped in (2, 3) else f"has version {version} of GGUF"
            raise CheckpointError(
                f"{self._path} {what}; EdgeForge reads little-endian files of versions 2 and 3: "
                f"convert the model again with a newer llama.cpp"
            )
        tensors, fields = int(self._number("Q")), int(self._number("Q"))
        if tensors > MAX_TENSORS_PER_FILE or fields > _MAX_FIELDS:
            raise CheckpointError(
                f"{self._path} is damaged: its header claims {tensors} tensors and {fields} fields"
            )
        found: dict[str, Value] = {}
        for _ in range(fields):
            key = self._string(_MAX_NAME)
            if key in found:
                raise CheckpointError(f"{self._path} is damaged: it has {quoted(key)} twice")
            found[key] = self._value(key)
        listed = [self._tensor() for _ in range(tensors)]
        return self._placed(found, listed)

    def _bytes(self, count: int) -> bytes:
        if self._at + count > self._size:
            raise CheckpointError(
                f"{self._path} ends within its header, after {self._size} bytes: the download was "
                f"probably cut short"
            )
        self._at += count
        if self._at > _MAX_HEADER:
            raise CheckpointError(
                f"{self._path} has a header of more than {_MAX_HEADER} bytes: the file is damaged"
            )
        found = self._file.read(count)
        if len(found) < count:
            raise CheckpointError(f"{self._path} became shorter while its header was read")
        return found

    def _number(self, code: str) -> int | float | bool:
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))
        found: int | float | bool = value
        return found

    def _string(self, limit: int) -> str:
        length = int(self._number("Q"))
        if length > limit:
            raise CheckpointError(
                f"{self._path} is damaged: a text in its header claims {length} bytes"
            )
        # A token may be part of a character; those bytes are kept apart from all characters.
        return self._bytes(length).decode("utf-8", errors="surrogateescape")

    def _value(self, key: str) -> Value:
        kind = int(self._number("I"))
        if kind == _STRING:
            return self._string(_MAX_STRING)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self._unknown(key, kind)
        inner, length = int(self._number("I")), int(self._number("Q"))
        if length > _MAX_ARRAY:
            raise CheckpointError(
                f"{self._path} is damaged: {quoted(key)} claims a list of {length} values"
            )
        if inner == _STRING:
            return [self._string(_MAX_STRING) for _ in range(length)]
        if inner not in _NUMBERS:
            raise self._unknown(key, inner)
        code = _NUMBERS[inner]
        return list(struct.unpack(f"<{length}{code}", self._bytes(length * struct.calcsize(code))))

    def _unknown(self, key: str, kind: int) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is damaged: {quoted(key)} has the type {kind}, which GGUF does not have"
        )

    def _tensor(self) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = self._string(_MAX_NAME)
        count = int(self._number("I"))
        where = f"tensor {quoted(name)} in {self._path}"
        if count > _MAX_DIMENSIONS:
            raise CheckpointError(f"{where} claims {count} dimensions: the file is damaged")
        shape = tuple(int(self._number("Q")) for _ in range(count))[::-1]
        kind = find_type(int(self._number("I")), where)
        return name, shape, kind, int(self._number("Q"))

    def _placed(
        self,
        fields: dict[str, Value],
        listed: list[tuple[str, tuple[int, ...], TensorType, int]],
    ) -> GgufHeader:
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
            raise CheckpointError(
                f"{self._path} is damaged: its general.alignment is {quoted(alignment)}"
            )
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        types: dict[str, TensorType] = {}
        for name, shape, kind, offset in listed:
            where = f"tensor {quoted(name)} in {self._path}"
            if name in tensors:
                raise CheckpointError(f"{where} is listed twice: the file is damaged")
            elements = count_elements(shape)
            if elements is None:
                raise CheckpointError(f"{where} has a shape too large to address: {list(shape)}")
            if elements and shape[-1:] and shape[-1] % kind.values:
                raise CheckpointError(
                    f"{where} has rows of {shape[-1]} values, and {kind.name} has blocks of "
                    f"{kind.values}: the file is damaged"
                )
            nbytes = elements // kind.values * kind.nbytes
            if offset % alignment:
                raise CheckpointError(
                    f"{where} begins at no multiple of {alignment}: it is damaged"
                )
            if start + offset + nbytes > self._size:
                raise CheckpointError(
                    f"{where} needs {nbytes} bytes from byte {start + offset} on, and the file "
                    f"has {self._size}: the download was probably cut short"
                )
            tensors[name] = TensorEntry(name, kind.dtype, shape, self._path, start + offset, nbytes)
            types[name] = kind
        _check_apart(self._path, list(tensors.values()))
        return GgufHeader(self._path, fields, tensors, types, start)


def _check_apart(path: Path, entries: list[TensorEntry]) -> None:
    """Refuses tensors that share bytes."""
    entries = sorted((e for e in entries if e.nbytes), key=lambda entry: entry.offset)
    for one, other in pairwise(entries):
        if one.offset + one.nbytes > other.offset:
            raise CheckpointError(
                f"{path} is damaged: {quoted(one.name)} and {quoted(other.name)} share bytes"
            )
