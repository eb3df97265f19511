"""The options of `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Measured = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR...",
        help="Artifacts that export wrote, or folders that hold such. Several take turns, and each "
        "is held against the first.",
    ),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where to run: host (the default), or a name from `edgeforge devices`; repeat the "
        "option, or separate names by commas, for several at once.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "--prefill",
        metavar="N[,N]...",
        help="Tokens of the prompt, one length or several; by default 128.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N]...",
        help="Tokens to generate, one number or several, each with each prompt; by default 32. The "
        "first comes of the prompt itself; the others are timed one by one.",
    ),
]
Decode = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N]...",
        help="In place of --output: tokens that are timed one by one after the first.",
    ),
]
Runs = Annotated[
    int,
    typer.Option(
        min=1, max=1000, help="Warm runs that count; an interval of a ratio needs 6 or more."
    ),
]
WarmUp = Annotated[
    int, typer.Option(min=0, max=100, help="Runs after the cold one that do not count.")
]
Rest = Annotated[
    float,
    typer.Option(min=0, max=3600, help="Seconds to leave a device alone before each run."),
]
CoolTo = Annotated[
    float | None,
    typer.Option(
        min=-50,
        max=200,
        help="Wait before each run until no temperature is above that, in degrees Celsius; a "
        "phone's thermal status is waited for in any case.",
    ),
]
LongestWait = Annotated[
    float,
    typer.Option(
        min=0, max=86400, help="Seconds to wait for that, at most; a run after it does not count."
    ),
]
Minutes = Annotated[
    float,
    typer.Option(
        min=0,
        max=1440,
        help="Then run the first lengths for so many minutes without a rest, for a curve.",
    ),
]
HistoryFile = Annotated[
    Path | None,
    typer.Option(
        "--history",
        metavar="FILE",
        help="Add the figures to this file, a line of JSON each, and show what changed since the "
        "last comparable ones.",
    ),
]
BenchOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Write everything to this file; by default each artifact's share goes to its "
        "bench.json, beside what other devices gave.",
    ),
]
Kleidiai = Annotated[
    str | None,
    typer.Option(
        metavar="on|off",
        help="Whether onnxruntime uses KleidiAI's kernels on arm64 devices; by default as "
        "onnxruntime does.",
    ),
]
Instructions = Annotated[
    bool,
    typer.Option(
        "--instructions",
        help="Also count instructions on emulated arm64 cores: a cost to compare, no latency.",
    ),
]
Runner = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Run this program on an Android phone instead, beside the artifact's files, and read "
        "the figures that it prints (ExecuTorch's llama runner, llama-bench); its arguments follow "
        "after --.",
    ),
]
EveryRun = Annotated[bool, typer.Option("--full", help="List every run.")]
