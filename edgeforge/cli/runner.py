"""The command `edgeforge devices runner`: a program of the user's own on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeforge.cli import options as option
from edgeforge.cli.printable import json_text, printable_lines

if TYPE_CHECKING:
    from device_harness.devices.android.runner import RunnerResult

Program = Annotated[
    Path, typer.Argument(metavar="PROGRAM", help="The program on this machine, for arm64-v8a.")
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ARGS",
        help="Its arguments, after two dashes; files of the artifact are named without a folder.",
    ),
]
Phone = Annotated[str, typer.Option("--device", metavar="NAME", help="android, or android:SERIAL.")]
Artifact = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="An artifact whose files the program finds where it runs."),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file", metavar="FILE", help="A further file, such as a model; repeat it for several."
    ),
]
Seconds = Annotated[
    float, typer.Option(min=1, max=86400, help="How long the program may run, at most.")
]
Results = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A new folder for the files that the program writes."),
]


def runner(
    program: Program,
    arguments: Arguments = None,
    device: Phone = "android",
    artifact: Artifact = None,
    file: Files = None,
    seconds: Seconds = 600.0,
    results: Results = None,
    json: option.Json = False,
) -> None:
    """Run a program of your own on a phone, and read the figures that it prints."""
    from device_harness.devices.android.device import AndroidDevice
    from device_harness.devices.android.runner import run_runner
    from device_harness.devices.registry import kind_of, open_device
    from device_harness.errors import DeviceError
    from edgeforge.cli.progress import Reporter
    from edgeforge.errors import UsageError
    from exporters.manifest import Manifest

    if kind_of(device) != "android":
        raise UsageError(f"a program of your own runs on phones, and {device} is none")
    if results is not None and results.exists():
        raise UsageError(f"{results} exists: name a new folder for what the program writes")
    given = None if artifact is None else (artifact, Manifest.read(artifact))
    with Reporter() as progress, open_device(device, progress=progress) as phone:
        assert isinstance(phone, AndroidDevice)
        before = phone.condition()
        done = run_runner(phone, program, arguments or [], given, seconds, results, file or ())
        record = {
            "schema_version": 1,
            "program": program.name,
            "arguments": arguments or [],
            "device": phone.facts().as_json(),
            "limits": list(phone.limits),
            "before": before.as_json(),
            "after": phone.condition().as_json(),
            **_as_json(done),
        }
        name = phone.name
    if json:
        print(json_text(record))
    else:
        print(printable_lines(_lines(done)))
    if done.code:
        said = done.errors.strip().splitlines()[-1:]
        raise DeviceError(
            f"{program.name} on {name} ended with {_end(done.code)}"
            f"{f': {said[0][:300]}' if said else ''}"
        )


def _as_json(done: RunnerResult) -> dict[str, Any]:
    found = asdict(done)
    return {**found, "results": [str(path) for path in done.results]}


def _end(code: int) -> str:
    if code == 137:
        return "signal 9, as a phone ends programs where memory runs out"
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"


def _lines(done: RunnerResult) -> Iterator[str]:
    yield from done.output.splitlines()
    yield ""
    for figures in done.figures:
        parts = [
            f"{what} {value:,.2f}{unit}"
            for what, value, unit in (
                ("load", figures.load_seconds, " s"),
                ("first token", figures.first_token_seconds, " s"),
                ("prefill", figures.prefill_tokens_per_second, " tokens/s"),
                ("decode", figures.decode_tokens_per_second, " tokens/s"),
            )
            if value is not None
        ]
        text = f"{figures.prompt_tokens or 0} + {figures.output_tokens or 0} tokens"
        yield f"{figures.source}, {text}: {', '.join(parts) or 'no speed of its own'}"
    if not done.figures:
        yield "It printed no figures in a form that is known here."
    peak = done.memory.peak_bytes
    memory = f", {peak / 1e6:,.0f} MB of memory at most" if peak else ""
    yield f"It ran for {done.seconds:.1f} s{memory}."
    yield from (f"written to {path}" for path in done.results)
