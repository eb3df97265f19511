"""Texts of strangers in Markdown: names of models, licences and files may hold anything."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

# Marks that begin something within a line of CommonMark, of GitHub's Markdown or of the hub's.
_MARKS: Final = re.compile(r"([\\`*_{}\[\]<>|#~&$@])")
# Between letters and digits an underscore begins nothing, and most names hold some.
_INSIDE: Final = re.compile(r"(?<=[^\W_])\\_(?=[^\W_])")
_ADDRESS: Final = re.compile(r"(?i)(:(?=//)|(?<=www)\.)")
# What begins a list, a heading or a quotation at the start of an item.
_START: Final = re.compile(r"(?:[-+=]|\d+[.)])(?=\s|$|[-=])")
_LONGEST: Final = 300


def plain(text: str) -> str:
    r"""A text that Markdown shows as it is, in one line.

    >>> plain("SmolLM2_135-M"), plain("a|b\n<script> ![x](http://y)")
    ('SmolLM2_135-M', 'a\\|b \\<script\\> !\\[x\\](http\\://y)')
    >>> plain("1. one"), plain("- two"), plain("__x__")
    ('1\\. one', '\\- two', '\\_\\_x\\_\\_')
    """
    words = " ".join(visible(text).split())
    if len(words) > _LONGEST:
        words = f"{words[:_LONGEST]}..."
    escaped = _ADDRESS.sub(r"\\\1", _INSIDE.sub("_", _MARKS.sub(r"\\\1", words)))
    begin = _START.match(escaped)
    if begin is None:
        return escaped
    at = begin.end() - 1
    return f"{escaped[:at]}\\{escaped[at:]}"


def code(text: str) -> str:
    r"""A text as code, which Markdown does not look into, in one line.

    >>> code("int4-g32"), code("a`b"), code("a|b")
    ('`int4-g32`', "`a'b`", '`a/b`')
    """
    words = " ".join(visible(text).split())
    # Within code nothing can be escaped, and a table ends a cell there too.
    return f"`{words.replace('`', chr(39)).replace('|', '/')[:_LONGEST]}`" if words else ""


def visible(text: str) -> str:
    """A text without characters that no one sees, such as marks that turn its direction."""
    return "".join("?" if _is_hidden(each) else each for each in text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co") and character not in "\n\t\r"
