"""Encodes records as FlatBuffers and decodes them again, by a schema that is given as text.

Writing and reading use the same few lines of schema, so that they cannot differ and no code has to
be generated. Only the parts of FlatBuffers that ExecuTorch's formats use are here: tables, unions
of tables, strings, scalars, and vectors of them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import flatbuffers

# The type's name in a schema, then its code in `struct` and its name in `flatbuffers`.
_SCALARS: Final = {
    "bool": ("?", "Bool"),
    "byte": ("b", "Int8"),
    "ubyte": ("B", "Uint8"),
    "short": ("h", "Int16"),
    "int": ("i", "Int32"),
    "uint": ("I", "Uint32"),
    "long": ("q", "Int64"),
    "ulong": ("Q", "Uint64"),
    "float": ("f", "Float32"),
    "double": ("d", "Float64"),
}
_MAX_DEPTH = 16
# Writers may let several tables refer to one string or table. A few bytes that refer to each other
# again and again would stand for gigabytes.
_LARGEST_RATIO = 16


@dataclass(frozen=True)
class Record:
    """One table.

    Attributes:
        table: the table's name; in a union, the member's name.
        fields: the fields' values by name: numbers, strings, records, lists of these, or None
            when a field is absent.
    """

    table: str
    fields: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:  # only the schema knows the field's type
        return self.fields[name]


@dataclass(frozen=True)
class _Field:
    name: str
    type: str  # of the element, when it is a vector
    vector: bool
    slot: int


@dataclass
class _Reading:
    """A buffer that is decoded, and how many bytes of it may still be gone through."""

    data: bytes
    left: int

    def take(self, nbytes: int) -> bytes:
        """Notes that bytes are gone through, and returns the buffer."""
        self.left -= nbytes
        if self.left < 0:
            raise ValueError("it is damaged (its tables refer to each other too often)")
        return self.data


class Schema:
    """The tables and unions of a format.

    Args:
        text: lines ``table NAME: FIELD:TYPE ...`` and ``union NAME: MEMBER[=TABLE] ...``, in the
            order of the format's own schema; ``[TYPE]`` is a vector.
        identifier: the format's four bytes, which follow the root's offset at a file's beginning.

    >>> schema = Schema("table Point: x:int names:[string]", b"TEST")
    >>> schema.decode(schema.encode(Record("Point", {"x": 7, "names": ["a"]})), "Point").fields
    {'x': 7, 'names': ['a']}
    """

    def __init__(self, text: str, identifier: bytes) -> None:
        self.identifier = identifier
        self._tables: dict[str, list[_Field]] = {}
        self._slots: dict[str, int] = {}
        self._unions: dict[str, list[tuple[str, str]]] = {}
        rows = [line.split() for line in text.strip().splitlines()]
        for kind, name, *words in rows:
            if kind == "union":
                pairs = (word.partition("=") for word in words)
                self._unions[name[:-1]] = [(member, table or member) for member, _, table in pairs]
        for kind, name, *words in rows:
            if kind == "table":
                self._read_table(name[:-1], words)

    def _read_table(self, name: str, words: list[str]) -> None:
        slot, fields = 0, []
        for word in words:
            label, _, type = word.partition(":")
            vector = type.startswith("[")
            type = type.strip("[]")
            slot += type in self._unions  # a union takes two slots: the member's number is first
            fields.append(_Field(label, type, vector, slot))
            slot += 1
        self._tables[name], self._slots[name] = fields, slot

    def encode(self, root: Record) -> bytes:
        """Encodes a whole buffer whose root is this record."""
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self._table(builder, root.table, root), file_identifier=self.identifier)
        return bytes(builder.Output())

    def _table(self, builder: flatbuffers.Builder, table: str, record: Record) -> int:
        strangers = record.fields.keys() - {given.name for given in self._tables[table]}
        assert not strangers, f"{table} has no {strangers}"
        offsets: dict[str, int] = {}
        members: dict[str, int] = {}
        for given in self._tables[table]:
            value = record.fields.get(given.name)
            if value is None:
                continue
            if given.vector:
                offsets[given.name] = self._vector(builder, given.type, value)
            elif given.type == "string":
                offsets[given.name] = builder.CreateString(value)
            elif given.type in self._unions:
                assert isinstance(value, Record)
                names = [member for member, _ in self._unions[given.type]]
                members[given.name] = names.index(value.table)
                concrete = self._unions[given.type][members[given.name]][1]
                offsets[given.name] = self._table(builder, concrete, value)
            elif given.type not in _SCALARS:
                assert isinstance(value, Record)
                offsets[given.name] = self._table(builder, given.type, value)
        builder.StartObject(self._slots[table])
        for given in self._tables[table]:
            if given.name in members:
                builder.PrependUint8Slot(given.slot - 1, members[given.name] + 1, 0)
            if given.name in offsets:
                builder.PrependUOffsetTRelativeSlot(given.slot, offsets[given.name], 0)
            elif given.type in _SCALARS and record.fields.get(given.name) is not None:
                prepend = getattr(builder, f"Prepend{_SCALARS[given.type][1]}Slot")
                prepend(given.slot, record.fields[given.name], 0)
        end: int = builder.EndObject()
        return end

    def _vector(self, builder: flatbuffers.Builder, type: str, values: object) -> int:
        assert isinstance(values, list | tuple)
        if type in _SCALARS:
            code, name = _SCALARS[type]
            size = struct.calcsize(code)
            builder.StartVector(size, len(values), size)
            for value in reversed(values):
                getattr(builder, f"Prepend{name}")(value)
        else:
            offsets = [
                builder.CreateString(value)
                if type == "string"
                else self._table(builder, type, value)
                for value in values
            ]
            builder.StartVector(4, len(offsets), 4)
            for offset in reversed(offsets):
                builder.PrependUOffsetTRelative(offset)
        end: int = builder.EndVector()
        return end

    def decode(self, data: bytes, root: str) -> Record:
        """Decodes a buffer's root table; absent numbers become 0, absent vectors empty lists.

        Raises:
            ValueError: the identifier is another format's, or the buffer is damaged.
        """
        if data[4:8] != self.identifier:
            raise ValueError(f"it begins with {data[4:8]!r}, not {self.identifier!r}")
        try:
            reading = _Reading(data, _LARGEST_RATIO * len(data))
            return self._read(reading, root, root, _follow(data, 0), 0)
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"it is damaged ({error})") from error

    def _read(self, reading: _Reading, table: str, name: str, at: int, depth: int) -> Record:
        data = reading.take(4)
        if depth > _MAX_DEPTH:
            raise ValueError("it is damaged (its tables are nested too deeply)")
        vtable = at - _scalar(data, "i", at)
        slots = (_scalar(data, "H", vtable) - 4) // 2
        found: dict[str, object] = {}
        for given in self._tables[table]:
            place = _scalar(data, "H", vtable + 4 + 2 * given.slot) if given.slot < slots else 0
            if not place:
                found[given.name] = [] if given.vector else 0 if given.type in _SCALARS else None
            elif given.vector:
                found[given.name] = self._read_vector(reading, given.type, at + place, depth)
            elif given.type in self._unions:
                number = _scalar(data, "B", at + _scalar(data, "H", vtable + 2 + 2 * given.slot))
                if not number:
                    raise ValueError("it is damaged (a union does not say which member it holds)")
                member, concrete = self._unions[given.type][number - 1]
                found[given.name] = self._read(
                    reading, concrete, member, _follow(data, at + place), depth + 1
                )
            else:
                found[given.name] = self._read_one(reading, given.type, at + place, depth)
        return Record(name, found)

    def _read_vector(self, reading: _Reading, type: str, at: int, depth: int) -> list[object]:
        data = reading.data
        start = _follow(data, at)
        count = _scalar(data, "I", start)
        size = struct.calcsize(_SCALARS[type][0]) if type in _SCALARS else 4
        if start + 4 + count * size > len(data):
            raise ValueError("it is damaged (a vector is longer than the buffer)")
        reading.take(count * size)
        if type in _SCALARS:
            return list(struct.unpack_from(f"<{count}{_SCALARS[type][0]}", data, start + 4))
        return [self._read_one(reading, type, start + 4 + 4 * i, depth) for i in range(count)]

    def _read_one(self, reading: _Reading, type: str, at: int, depth: int) -> object:
        data = reading.data
        if type in _SCALARS:
            return _scalar(data, _SCALARS[type][0], at)
        target = _follow(data, at)
        if type == "string":
            count = _scalar(data, "I", target)
            if target + 4 + count > len(data):
                raise ValueError("it is damaged (a string is longer than the buffer)")
            reading.take(count)
            return data[target + 4 : target + 4 + count].decode()
        return self._read(reading, type, type, target, depth + 1)


def _scalar(data: bytes, code: str, at: int) -> int:
    if at < 0:
        raise ValueError("it is damaged (an offset leads out of the buffer)")
    value: int = struct.unpack_from("<" + code, data, at)[0]
    return value


def _follow(data: bytes, at: int) -> int:
    return at + _scalar(data, "I", at)
