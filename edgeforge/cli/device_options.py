"""The options that the commands of `devices` alone have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SetUpDevice = Annotated[
    str, typer.Argument(metavar="DEVICE", help="What to set up: arm64, the emulated cores.")
]
SetUpExecutorch = Annotated[
    bool,
    typer.Option(
        "--executorch", help="Set up ExecuTorch's kernels for arm64 too: 120 MB more to download."
    ),
]
Counted = Annotated[
    list[Path],
    typer.Argument(metavar="DIR...", help="Artifacts that export wrote; the first is held as 1."),
]
CountingDevice = Annotated[
    str, typer.Option("--device", metavar="NAME", help="An emulated core, such as arm64:max.")
]
CountedPrompt = Annotated[
    int, typer.Option(min=1, metavar="N", help="Tokens of the prompt, run in one call.")
]
CountedKleidiai = Annotated[
    str | None,
    typer.Option(
        "--kleidiai",
        help="Whether onnxruntime uses KleidiAI's kernels: on or off; by default as it does.",
    ),
]
CountedOutput = Annotated[
    int, typer.Option(min=2, metavar="N", help="Tokens to generate, the first by the prompt.")
]
