"""The command line: each command reads its options, calls one function and prints the result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeforge.cli import options as option
from edgeforge.cli.bench import AfterDashes, bench
from edgeforge.cli.cache_warning import print_cache_warning
from edgeforge.cli.chat import chat
from edgeforge.cli.devices import devices
from edgeforge.cli.export import export, export_adapter
from edgeforge.cli.export_module import export_module
from edgeforge.cli.plan import plan
from edgeforge.cli.printable import json_text, printable, printable_lines, table_console
from edgeforge.cli.run import run

app = typer.Typer(
    name="edgeforge",
    help="Compiles language models for phones: one trace, one quantization, verified artifacts.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    suggest_commands=False,  # `edgeforge.cli.exits` suggests, and only for slips of typing
)
app.add_typer(devices, name="devices")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("edgeforge"))
        except PackageNotFoundError:
            print("unknown: EdgeForge runs from a folder and is not installed as a package")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the traceback of an error as well.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Declares the options before the command for --help; `edgeforge.cli.entry` reads them."""


app.command()(export)
app.command()(export_adapter)
app.command(name="export-module")(export_module)
app.command()(plan)


@app.command()
def verify(
    artifacts: option.Artifacts,
    text: option.Text = None,
    tokens: option.Tokens = None,
    checkpoint: option.CheckpointPlace = None,
    bound: option.Bounds = None,
    against: option.Against = None,
    full: option.Full = False,
    timed: option.Timed = True,
    precision: option.InterpreterPrecision = None,
    compute_units: option.ComputeUnits = None,
    device: option.Devices = None,
    kleidiai: option.Kleidiai = None,
    threads: option.Threads = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Run artifacts, and report their accuracy and speed (also in each one's report.json)."""
    from edgeforge.cli.export_module import only_modules, verify_modules
    from edgeforge.cli.progress import Reporter
    from edgeforge.cli.verdict import print_results
    from edgeforge.verification.artifacts import find_artifacts
    from edgeforge.verification.bounds import parse_bounds
    from edgeforge.verification.sample import parse_tokens
    from edgeforge.verification.soundness import require_sound
    from edgeforge.verification.verify import verify_together
    from edgeforge.verification.verify_options import VerifyOptions, devices_of
    from exporters.modules.manifest import is_module

    folders = find_artifacts(artifacts)
    if any(map(is_module, folders)):
        return verify_modules(only_modules(folders), threads, json)
    options = VerifyOptions(
        text=text,
        tokens=parse_tokens(tokens),
        checkpoint=checkpoint,
        threads=threads,
        timed=timed,
        runtime={"precision": precision, "compute_units": compute_units},
        bounds=parse_bounds(bound or ()),
        against=against,
        devices=devices_of(device or (), kleidiai),
    )
    with Reporter(quiet) as progress:
        results = verify_together(folders, options, progress)
    print_cache_warning()
    if json:
        _print_json([result.to_json() for result in results])
    else:
        print_results(dict(zip(folders, results, strict=True)), artifacts, full=full)
    require_sound(folders, results)


@app.command()
def check(
    artifacts: option.Checked = None,
    policy: option.Policy = None,
    baseline: option.Baseline = None,
    update_baseline: option.UpdateBaseline = False,
    checkpoint: option.CheckpointPlace = None,
    timed: option.Speeds = True,
    threads: option.Threads = None,
    json: option.Json = False,
    junit: option.Junit = None,
    sarif: option.Sarif = None,
    markdown: option.Markdown = None,
    github: option.Github = None,
    quiet: option.Quiet = False,
) -> None:
    """Hold artifacts against a policy and a baseline; verify what has no fresh report."""
    from edgeforge.cli.gate_outputs import GateFiles, refuse_places, write_files
    from edgeforge.cli.progress import Reporter
    from edgeforge.gate.gate import GateOptions
    from edgeforge.gate.gate import check as run_check
    from edgeforge.gate.outputs.lines import text_lines

    files = GateFiles(junit=junit, sarif=sarif, markdown=markdown)
    options = GateOptions(
        policy=policy,
        baseline=baseline,
        update_baseline=update_baseline,
        checkpoint=checkpoint,
        threads=threads,
        timed=timed,
    )
    refuse_places(files, options, artifacts or [])
    with Reporter(quiet) as progress:
        result = run_check(artifacts or [], options, progress)
    print_cache_warning()
    if json:
        _print_json(result.to_json())
    else:
        print(printable_lines(text_lines(result)))
    write_files(result, files, github, sys.stderr if json else sys.stdout)
    result.require_passed()


@app.command()
def diagnose(
    artifact: option.Artifact,
    text: option.Text = None,
    tokens: option.DiagnoseTokens = None,
    checkpoint: option.CheckpointPlace = None,
    weights: option.DiagnoseWeights = True,
    full: option.DiagnoseFull = False,
    threads: option.Threads = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Find where an artifact loses accuracy: layer by layer, weight by weight, and what to do."""
    from edgeforge.cli.diagnosis_report import diagnosis_lines
    from edgeforge.cli.progress import Reporter
    from edgeforge.diagnosis.diagnose import DEFAULT_TOKENS, DiagnoseOptions
    from edgeforge.diagnosis.diagnose import diagnose as find
    from edgeforge.verification.sample import parse_tokens

    options = DiagnoseOptions(
        text=text,
        tokens=parse_tokens(tokens) or DEFAULT_TOKENS,
        checkpoint=checkpoint,
        threads=threads,
        weights=weights,
    )
    with Reporter(quiet) as progress:
        found = find(artifact, options, progress)
    print_cache_warning()
    if json:
        _print_json(found.to_json())
    else:
        print(printable_lines(diagnosis_lines(found, full=full)))


app.command(cls=AfterDashes)(bench)


@app.command()
def compare(artifacts: option.Compared, json: option.Json = False) -> None:
    """Hold artifacts, or files of bench, against the first of them; nothing is run."""
    from edgeforge.reports.lines import text_lines
    from edgeforge.reports.paired import compare as run_compare

    result = run_compare(artifacts)
    if json:
        _print_json(result.to_json())
    else:
        print(printable_lines(text_lines(result)))


@app.command()
def report(artifacts: option.Reported = None, out: option.Page = Path("report.html")) -> None:
    """Write one page about verified artifacts, to look at in a browser; nothing is run."""
    from edgeforge.reports.page import write_page

    path, notes = write_page(artifacts or [Path()], out)
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(printable(str(path)))


@app.command()
def inspect(
    artifact: option.Artifact,
    weights: option.EveryWeight = False,
    json: option.Json = False,
) -> None:
    """Show what an artifact holds and whether its files are as they were written."""
    from edgeforge.cli.export_module import inspect_module
    from edgeforge.cli.inspect_report import inspect_artifact
    from edgeforge.cli.tables import inspect_tables, section_tables, weight_table
    from exporters.modules.manifest import is_module

    if is_module(artifact):
        return inspect_module(artifact, json)
    report = inspect_artifact(artifact)
    if json:
        _print_json(report.to_json())
    else:
        print(printable_lines(report.lines()))
        tables = [*inspect_tables(report.manifest), *section_tables(report.sections)]
        for table in [*tables, weight_table(report.manifest)] if weights else tables:
            table_console().print(table)
    report.require_whole()
    if not json:
        print(
            "all files are as written; integers and scales read back equal the manifest's digests"
        )


app.command()(run)
app.command(name="chat")(chat)


@app.command(name="coreml-run")
def coreml_run(
    package: option.Package,
    inputs: option.Inputs = None,
    outputs: option.Outputs = None,
    function: option.Functions = None,
    precision: option.Precision = "fp16",
    compare: option.Compare = None,
    tolerance: option.Tolerance = None,
    max_iterations: option.MaxIterations = None,
    threads: option.InterpreterThreads = None,
    json: option.Json = False,
) -> None:
    """Describe a Core ML package, or run it without Core ML and compare its outputs."""
    from edgeforge.cli.coreml_run import RunRequest, report, require_close

    request = RunRequest(
        package,
        tuple(inputs or ()),
        tuple(outputs or ()),
        tuple(function or ()),
        precision,
        compare,
        tolerance,
        max_iterations,
        threads,
    )
    result, lines, compared = report(request)
    if json:
        _print_json(result)
    else:
        print(printable_lines(lines))
    if compared:
        require_close(compared, tolerance)


@app.command(name="list")
def list_known(
    what: option.What,
    json: option.Json = False,
) -> None:
    """List the families, recipes, targets and other names that EdgeForge knows."""
    from edgeforge.cli.catalogue import catalogue

    rows = catalogue(what)
    if json:
        _print_json(rows)
        return
    width = max(map(len, rows), default=0)
    for name, about in rows.items():
        print(printable(f"{name:<{width}}  {about}"))


@app.command()
def doctor(json: option.Json = False) -> None:
    """Tell what is installed, which runtimes work here, and what is missing."""
    from edgeforge.cli.doctor import examine, report_lines
    from edgeforge.errors import CheckFailed

    print("edgeforge: exporting a tiny model and running it", file=sys.stderr)
    report = examine()
    if json:
        _print_json(report.to_json())
    else:
        print(printable_lines(report_lines(report)))
    if report.export_problems:
        raise CheckFailed("; ".join(report.export_problems))


@app.command()
def synth(
    preset: option.Preset,
    out: option.Out,
    seed: option.WeightSeed = 0,
    force: option.Force = False,
    quiet: option.Quiet = False,
) -> None:
    """Write a checkpoint of random weights in the shape of a released model."""
    from edgeforge.cli.progress import Reporter
    from edgeforge.synth.synthesise import synthesise

    with Reporter(quiet) as progress:
        folder = synthesise(
            preset,
            out,
            seed=seed,
            force=force,
            progress=lambda done, size: progress("synthesise", done, size),
        )
    print(printable(str(folder)))


def _print_json(value: object) -> None:
    print(json_text(value))
