"""Options of `chat` and of `run --chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What the model is told before the first message."),
]
Template = Annotated[
    Path | None,
    typer.Option(
        "--chat-template", metavar="FILE", help="A Jinja template in place of the artifact's own."
    ),
]
Values = Annotated[
    list[str] | None,
    typer.Option(
        "--template-value",
        metavar="NAME=VALUE",
        help="A further name for the template, such as enable_thinking=false; repeat it for "
        "several.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-n",
        min=1,
        help="Largest number of tokens of an answer; by default what the context has room for.",
    ),
]
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print each answer as one line of JSON on stdout.")
]
IsChat = Annotated[
    bool,
    typer.Option("--chat", help="Give the prompt as a message, in the model's chat template."),
]


def template_values(given: list[str] | None) -> dict[str, object]:
    """Returns what ``--template-value`` gives: JSON values by name, or else texts.

    Raises:
        UsageError: one is not ``NAME=VALUE``.

    >>> template_values(["enable_thinking=false", "reasoning=high"])
    {'enable_thinking': False, 'reasoning': 'high'}
    """
    import json

    from edgeforge.errors import UsageError

    found: dict[str, object] = {}
    for each in given or ():
        name, mark, text = each.partition("=")
        if not mark or not name.isidentifier():
            raise UsageError(
                f"--template-value {each} is not NAME=VALUE, such as enable_thinking=false"
            )
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found
