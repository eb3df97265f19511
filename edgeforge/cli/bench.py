"""The command `bench`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TextIO

import typer
from typer.core import TyperCommand

from edgeforge.cli import bench_options as option
from edgeforge.cli import options as shared
from edgeforge.cli.printable import json_text, printable, printable_lines

_ARGUMENTS: Final = "edgeforge.bench.runner"

if TYPE_CHECKING:
    from pathlib import Path

    from device_harness.measuring.bench import Bench
    from edgeforge.measurements.history import History


class AfterDashes(TyperCommand):
    """A command whose words after ``--`` are the arguments of ``--runner``, where one is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes those words apart; without a runner they are artifacts, as everywhere."""
        given = args[: args.index("--")] if "--" in args else []
        if any(word.partition("=")[0] == "--runner" for word in given):
            ctx.meta[_ARGUMENTS] = tuple(args[len(given) + 1 :])
            args = given
        return super().parse_args(ctx, args)


def bench(
    context: typer.Context,
    artifacts: option.Measured,
    device: option.Devices = None,
    prompt: option.Prompt = None,
    output: option.Output = None,
    decode: option.Decode = None,
    runs: option.Runs = 6,
    warm_up: option.WarmUp = 1,
    rest: option.Rest = 0.0,
    cool_to: option.CoolTo = None,
    longest_wait: option.LongestWait = 600.0,
    minutes: option.Minutes = 0.0,
    instructions: option.Instructions = False,
    runner: option.Runner = None,
    history: option.HistoryFile = None,
    out: option.BenchOut = None,
    full: option.EveryRun = False,
    precision: shared.InterpreterPrecision = None,
    compute_units: shared.ComputeUnits = None,
    kleidiai: option.Kleidiai = None,
    threads: shared.Threads = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Measure how fast artifacts run on a device, and check that what they generate is text."""
    from device_harness.measuring.rules import Rules
    from edgeforge.cli.progress import Reporter
    from edgeforge.measurements.history import read_history
    from edgeforge.measurements.keep import refuse_places
    from edgeforge.measurements.measure import measure
    from edgeforge.measurements.options import BenchOptions, parse_devices, parse_lengths
    from edgeforge.measurements.result import require_measured
    from edgeforge.measurements.user_runner import UserRunner

    if output is not None and decode is not None:
        raise typer.BadParameter("--output and --decode say the same: give one of them")
    outputs = parse_lengths(output, "--output") or tuple(
        count + 1 for count in parse_lengths(decode, "--decode")
    )
    options = BenchOptions(
        devices=parse_devices(device or ()),
        prompts=parse_lengths(prompt, "--prompt"),
        outputs=outputs,
        rules=Rules(
            runs=runs,
            warm_up=warm_up,
            rest=rest,
            cool_to=cool_to,
            longest_wait=longest_wait,
            minutes=minutes,
        ),
        threads=threads,
        instructions=instructions,
        runtime={"precision": precision, "compute_units": compute_units, "kleidiai": kleidiai},
    )
    if runner is not None:
        words = context.meta.get(_ARGUMENTS, ())
        options = replace(options, runner=UserRunner(runner, words))
    refuse_places(artifacts, out, history, beside=True)
    earlier = None if history is None else read_history(history)
    with Reporter(quiet) as progress:
        found = measure(artifacts, options, progress)
    if json:
        _print_json(found)
    else:
        _print_text(found, full=full)
    if earlier is not None:
        _print_changes(found, earlier, sys.stderr if json else sys.stdout)
    for path in _kept(found, out):
        if not json:
            print(printable(f"written to {path}"))
    if earlier is not None:
        earlier.append(found)
    require_measured(found)


def _print_json(found: Bench) -> None:
    from device_harness.measuring.record_json import bench_json

    print(json_text(bench_json(found)))


def _print_text(found: Bench, *, full: bool) -> None:
    from edgeforge.cli.bench_lines import bench_lines, run_lines

    print(printable_lines([*bench_lines(found), *(run_lines(found) if full else ())]))


def _print_changes(found: Bench, history: History, stream: TextIO) -> None:
    from edgeforge.cli.bench_lines import change_lines

    print(printable_lines(change_lines(found, history)), file=stream)


def _kept(found: Bench, out: Path | None) -> list[Path]:
    """Writes the measurement; returns the files."""
    from edgeforge.measurements.bench_file import add_to_file, keep_with_artifacts

    if out is None:
        return keep_with_artifacts(found)
    add_to_file(found, out)
    return [out]
