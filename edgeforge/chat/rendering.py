"""Renders conversations with a chat template, in a process of its own that has bounds.

A template is a program of whoever made the checkpoint. Jinja's sandbox keeps it from the machine,
but not from running without end or filling the memory. `edgeforge.chat.template` therefore runs
`main` in a process of its own, with the arguments PACKAGES BYTES SECONDS and a request on stdin.
PACKAGES is the folder that has Jinja. The answer on stdout is JSON: ``{"texts": [...]}`` or
``{"refused": "why"}``.

The filters, functions and tags are those that transformers gives to templates.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, NoReturn

from edgeforge.tokenizer_trial import limit

LARGEST_TEXT: Final = 16 << 20
"""Characters of all texts of a request together; real conversations have far less."""


class Refused(Exception):
    """The template refused the conversation; the message is the template's own."""


def main() -> None:
    """Renders the request on stdin."""
    packages, memory, seconds = sys.argv[1:]
    request = json.loads(sys.stdin.buffer.read())
    limit(int(memory), int(seconds))
    sys.path.append(packages)
    try:
        answer: dict[str, object] = {"texts": rendered(**request)}
    except MemoryError:
        answer = {"refused": f"it takes more than {int(memory) >> 20} MiB of memory"}
    except RecursionError:
        answer = {"refused": "it is nested too deep"}
    except Refused as error:
        answer = {"refused": str(error) or "it refuses the conversation without a reason"}
    except Exception as error:  # whatever a template does is its own error
        answer = {"refused": f"{type(error).__name__}: {error}"}
    sys.stdout.buffer.write(json.dumps(answer).encode())


def rendered(
    template: str,
    conversations: list[list[dict[str, str]]],
    names: dict[str, Any],
    today: str | None = None,
) -> list[str]:
    """Returns the text of each conversation.

    Args:
        template: in Jinja.
        conversations: messages with ``role`` and ``content``.
        names: what else the template may use, such as ``bos_token``.
        today: the date that the template is told, such as ``2026-01-31``; None for the real one.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The tag that marks what the assistant says; it changes no text.

        What is set inside is not seen outside, as in transformers.
        """

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it as an instance's)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Callable[[], str]) -> str:
            return caller()

    class PlainNamespace(Namespace):
        """Jinja's namespace, without names that lead into Python."""

        def __setitem__(self, name: str, value: object) -> None:
            if name.startswith("_"):
                raise Refused(f"it sets {name} in a namespace")
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["namespace"] = PlainNamespace
    now = datetime.now() if today is None else datetime.fromisoformat(today)
    environment.globals["strftime_now"] = now.strftime
    compiled = environment.from_string(template)
    given = {"tools": None, "documents": None, **names}
    texts, room = [], LARGEST_TEXT
    for messages in conversations:
        pieces = []
        for piece in compiled.generate({"messages": messages, **given}):
            room -= len(piece)
            if room < 0:
                raise Refused(f"it writes more than {LARGEST_TEXT >> 20} million characters")
            pieces.append(piece)
        texts.append("".join(pieces))
    return texts


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a prompt has it; Jinja's own filter escapes what HTML reserves."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise Refused(message)
