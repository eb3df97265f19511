"""Quotes a value of a file in a message, in bounded time and length."""

from __future__ import annotations

import reprlib
from typing import Any, Final

_LONGEST: Final = 120


class _Short(reprlib.Repr):
    """Looks at a few elements of a few levels, whatever the value holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 4

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        # Python refuses to write more than 4,300 digits.
        return super().repr_int(x, level) if bits < 14_000 else f"<a whole number of {bits} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        return f"<{type(x).__name__}>"


_SHORT: Final = _Short()


def quoted(value: object) -> str:
    """Returns a value as Python writes it, cut short.

    >>> quoted("int4"), quoted([1, 2, 3, 4, 5, 6]), quoted(None), quoted(2.5)
    ("'int4'", '[1, 2, 3, 4, ...]', 'None', '2.5')
    >>> quoted(1 << 100_000)
    '<a whole number of 100001 bits>'
    """
    if isinstance(value, float | bool | None):
        return repr(value)
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
