"""Text of files as text: characters that would command the terminal are shown as escapes.

Names and messages come from checkpoints, artifacts and packages that strangers made. What `run`
generates is the model's answer: a pipe gets it as it is, a terminal without control characters.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quant.json_output import json_text as written

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

# What `json.dumps` leaves as it is though a terminal may act on it: controls, and marks that change
# the direction or the lines of a text.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def printable(text: str, keep: str = "") -> str:
    r"""Returns a text in which nothing commands the terminal.

    Args:
        text: of a file.
        keep: characters that stay though they are no printable ones, such as line breaks.

    >>> printable("größe \x1b[2J\n"), printable("a\nb", keep="\n")
    ('größe \\x1b[2J\\n', 'a\nb')
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else _escape(c)
        for c in text
    )


def printable_lines(lines: Iterable[str]) -> str:
    """Joins lines, each of which stays one line."""
    return "\n".join(map(printable, lines))


def answer(text: str) -> str:
    r"""Returns a model's text for a terminal: only control characters are escaped.

    >>> answer("one\ttwo\n\x1b]0;title\x07 \u3000")
    'one\ttwo\n\\x1b]0;title\\x07 \u3000'
    """
    return "".join(
        _escape(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def json_text(value: object) -> str:
    r"""Returns JSON, strict as `quant.json_output` writes it, that commands no terminal.

    >>> json_text({"größe": "\x9b2J"})
    '{\n "größe": "\\u009b2J"\n}'
    """
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", written(value))


def console(**options: Any) -> Console:
    """Returns a console of rich that escapes what it is given; its own colours stay.

    Args:
        options: of `rich.console.Console`.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich calls it where it has caught the error

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(printable(segment.text, keep="\n"), segment.style)

    return Escaping(**options)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def table_console() -> Console:
    """Returns a console for tables; what is no terminal is wide enough for all of them."""
    return console(width=None if sys.stdout.isatty() else 110)
