"""The options and arguments of adapters, of several commands."""

from __future__ import annotations

from typing import Annotated

import typer

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR[@WEIGHT]",
        help="Merge this adapter (a folder of peft: LoRA, rsLoRA or DoRA) into the weights before "
        "they are quantized, times a weight if one is given; give it several times for several.",
    ),
]
AdapterMode = Annotated[
    str,
    typer.Option(
        metavar="merged|separate",
        help="`separate` leaves adapters beside the base's weights, to be switched on by "
        "`run --adapter NAME`.",
    ),
]
AdapterFolder = Annotated[
    str,
    typer.Argument(metavar="DIR[@WEIGHT]", help="The folder of an adapter of peft."),
]
RunAdapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME", help="Switch on this adapter of the artifact; see `inspect`."
    ),
]


def only_one(names: list[str] | None) -> str | None:
    """Returns the adapter that a user switches on, None for none.

    Raises:
        UsageError: there are several.
    """
    from edgeforge.errors import UsageError

    if len(names or ()) > 1:
        raise UsageError(
            "--adapter is given twice, and an artifact runs with one adapter at a time: export one "
            "of both, each with its weight"
        )
    return names[0] if names else None
