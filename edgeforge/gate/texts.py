"""Texts of strangers made safe for what is written: names may hold anything."""

from __future__ import annotations

import re

# What XML 1.0 cannot hold at all, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~])")


def xml_text(text: str) -> str:
    r"""A text without the characters that no XML document can hold.

    >>> xml_text("a\x1bb")
    'a?b'
    """
    return _NOT_XML.sub("?", text)


def markdown_text(text: str) -> str:
    r"""A text that Markdown shows as it is, in one line.

    >>> markdown_text("a|b\n<c>")
    'a\\|b \\<c\\>'
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def command_text(text: str, *, is_property: bool = False) -> str:
    """A text in a workflow command of GitHub, as its toolkit escapes it.

    >>> command_text("50 %, done"), command_text("a: b", is_property=True)
    ('50 %25, done', 'a%3A b')
    """
    for char, code in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(char, code)
    if is_property:
        text = text.replace(":", "%3A").replace(",", "%2C")
    return text
