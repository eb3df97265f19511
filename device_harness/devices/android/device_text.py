"""Text that a device sent, made fit for a message or a record."""

from __future__ import annotations

import re
from typing import Final

# Sequences that move a terminal's cursor, colour it, set its title, or ask it to answer.
_ESCAPES: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -/]*[0-~])"
)
LONGEST_LINE: Final = 200


def clean(given: bytes | str) -> str:
    r"""Text without escape sequences and control characters; newlines and tabs are kept.

    >>> clean(b"Pixel\x1b[31m 9\x07\n")
    'Pixel 9\n'
    """
    text = given.decode("utf-8", "replace") if isinstance(given, bytes) else given
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def one_line(given: bytes | str, longest: int = LONGEST_LINE) -> str:
    r"""The last line that says something, cut to a length.

    >>> one_line("first\n  last  \n\n")
    'last'
    """
    lines = [line for line in clean(given).splitlines() if line.strip()]
    found = " ".join(lines[-1].split()) if lines else ""
    return found if len(found) <= longest else f"{found[: longest - 3]}..."
