"""`Metadata`: a GGUF file's fields about one architecture, read by name and type."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from edgeforge.checkpoint.gguf.header import Value
from edgeforge.errors import CheckpointError
from quant.quoted import quoted


class Metadata:
    """Reads fields, and remembers which; those left unread might change what a model computes.

    Args:
        fields: the file's fields by key.
        prefix: the architecture, with which its own keys begin.
        where: the file, for messages.
    """

    def __init__(self, fields: Mapping[str, Value], prefix: str, where: str) -> None:
        self._fields, self._prefix, self.where = fields, prefix, where
        self._read: set[str] = set()

    def get(self, field: str) -> Value | None:
        """Returns a field of the architecture, by its key without the prefix; None without it."""
        self._read.add(f"{self._prefix}.{field}")
        return self._fields.get(f"{self._prefix}.{field}")

    def integer(self, field: str, default: int | None = None) -> int:
        """Returns a number; a list with one number for each layer counts where all are the same.

        Raises:
            CheckpointError: the field is missing without a default, or is something else.
        """
        value = self.get(field)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._unusable(field, value)
        return value

    def real(self, field: str, default: float | None = None) -> float:
        """Returns a number as it was before it was rounded to float32.

        Raises:
            CheckpointError: the field is missing without a default, or is something else.
        """
        value = self.get(field)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._unusable(field, value)
        return shortest(float(value))

    def unread(self) -> dict[str, Value]:
        """Returns the architecture's fields that nothing has read."""
        begin = f"{self._prefix}."
        return {
            key: value
            for key, value in self._fields.items()
            if key.startswith(begin) and key not in self._read
        }

    def _unusable(self, field: str, value: object) -> CheckpointError:
        key = f"{self._prefix}.{field}"
        if value is None:
            return CheckpointError(f"{self.where} has no field {key}, which says the model's sizes")
        return CheckpointError(f"{self.where}: {key} is {quoted(value)}, which is not usable here")


def shortest(value: float) -> float:
    """Returns the number with the fewest digits that rounds to the same float32.

    >>> shortest(9.999999747378752e-06)
    1e-05
    """
    for digits in range(1, 10):
        found = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", found) == struct.pack("<f", value):
                return found
        except OverflowError:
            break
    return value
