"""Text of a device or of a tool, made fit for a terminal."""

from __future__ import annotations


def plain(text: str, longest: int = 300) -> str:
    r"""The beginning of a text on one line, without what moves or colours a terminal's.

    >>> plain("iPhone\x1b[31m\n15")
    'iPhone [31m 15'
    """
    return "".join(c if c.isprintable() else " " for c in text[:longest])
