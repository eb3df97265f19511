"""The options that `plan` alone has."""

from __future__ import annotations

from typing import Annotated

import typer

Sized = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint folder, a GGUF file, a config.json, a hub id (org/name) of which only "
        "the configuration is read, or `demo`.",
    ),
]
PlannedDevice = Annotated[
    str, typer.Option("--device", help="A phone: a name from `edgeforge list phones`.")
]
PlannedTargets = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Targets, separated by commas; by default coreml for iOS and onnx for Android.",
    ),
]
PlannedRecipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        help="A name from `edgeforge list recipes`, or a YAML file of rules; several times for "
        "several; by default all.",
    ),
]
PlannedAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="An adapter (a folder of peft) that `export --adapter-mode separate` would leave "
        "beside the weights; several times for several. A merged one changes no size.",
    ),
]
SystemVersion = Annotated[
    str | None,
    typer.Option(
        "--os",
        help="Version of the phone's system, such as 26.4, as limits change with it; by default "
        "the newest of which a limit is known.",
    ),
]
AppMemory = Annotated[
    str | None,
    typer.Option(
        "--memory", help="Memory that an app may take, such as 3GB, in place of the known limit."
    ),
]
