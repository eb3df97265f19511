"""The command line: each command reads its options, calls one function and prints the result."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from edgeforge.cli import options as option
from edgeforge.cli.exits import ended_by_signals, explain, one_line

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="edgeforge",
    help="Compiles language models for phones: one trace, one quantization, proven artifacts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose, not only what it is.")
    ] = False,
) -> None:
    """Options before the command; `main` reads them from the arguments themselves."""


@app.command()
def export(
    model: option.Model,
    out: option.Out,
    target: option.Targets = "onnx",
    recipe: option.Recipe = None,
    rotation: option.Rotation = None,
    imported_scales: option.ImportedScales = "float16",
    context: option.Context = None,
    tokenizer: option.Tokenizer = None,
    revision: option.Revision = None,
    ignore_config: option.IgnoreConfig = None,
    strip: option.Strip = False,
    weights: option.Weights = None,
    profile: option.Profile = None,
    chunk: option.Chunk = None,
    cache_write: option.CacheWrite = None,
    opset: option.Opset = None,
    lowering: option.Lowering = None,
    backend: option.Backend = None,
    kv_cache: option.KvCache = None,
    max_memory: option.MaxMemory = None,
    bits_per_weight: option.BitsPerWeight = None,
    max_size: option.MaxSize = None,
    max_kl: option.MaxKl = None,
    save_plan: option.SavePlan = None,
    calibration: option.Calibration = None,
    calibration_tokens: option.CalibrationTokens = 64 * 512,
    calibration_length: option.CalibrationLength = 512,
    seed: option.CalibrationSeed = 0,
    resume: option.Resume = None,
    force: option.Force = False,
    threads: option.Threads = None,
    quiet: option.Quiet = False,
) -> None:
    """Trace, quantize and write a model for one or more runtimes."""
    from edgeforge import api
    from edgeforge.cli.progress import Reporter
    from edgeforge.cli.sizes import parse_size, size_text
    from exporters.manifest import Manifest

    with Reporter(quiet) as progress:
        folders = api.export(
            model,
            out,
            targets=[name.strip() for name in target.split(",")],
            recipe=recipe,
            rotation=rotation,
            imported_scales=imported_scales,
            context=context,
            tokenizer=tokenizer,
            revision=revision,
            ignore_config=ignore_config or (),
            strip=strip,
            weights=weights,
            profile=profile,
            chunk=chunk,
            cache_write=cache_write,
            opset=opset,
            lowering=lowering,
            backend=backend,
            kv_cache=kv_cache,
            max_memory=None if max_memory is None else parse_size(max_memory),
            bits_per_weight=bits_per_weight,
            max_size=None if max_size is None else parse_size(max_size),
            max_kl=max_kl,
            save_plan=save_plan,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            calibration_length=calibration_length,
            seed=seed,
            resume=resume,
            force=force,
            threads=threads,
            progress=progress,
        )
    for folder in folders:
        manifest = Manifest.read(folder)
        size = size_text(sum(record.size for record in manifest.files.values()))
        print(
            f"{folder}: {manifest.target}, {manifest.recipe}, context {manifest.context}, "
            f"{manifest.bits_per_weight:.3f} bits a weight, {size}"
        )


@app.command()
def verify(
    artifacts: option.Artifacts,
    text: option.Text = None,
    tokens: option.Tokens = None,
    checkpoint: option.CheckpointPlace = None,
    timed: option.Timed = True,
    precision: option.InterpreterPrecision = None,
    compute_units: option.ComputeUnits = None,
    threads: option.Threads = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
) -> None:
    """Run an artifact and report how right and how fast it is (also in report.json)."""
    from edgeforge.cli.progress import Reporter
    from edgeforge.cli.tables import evaluation_tables, limit_lines
    from edgeforge.verification.verify import VerifyOptions, find_artifacts
    from edgeforge.verification.verify import verify as run_verify

    runtime = {"precision": precision, "compute_units": compute_units}
    options = VerifyOptions(text, tokens, checkpoint, threads, timed, runtime)
    results = []
    for folder in find_artifacts(artifacts):
        with Reporter(quiet) as progress:
            results.append(run_verify(folder, options, progress))
    if json:
        _print_json([result.to_json() for result in results])
        return
    for table in evaluation_tables(results):
        _console().print(table)
    for line in limit_lines(results):
        print(line)


@app.command()
def inspect(
    artifact: option.Artifact,
    weights: option.EveryWeight = False,
    json: option.Json = False,
) -> None:
    """Show what an artifact holds and whether its files are as they were written."""
    from edgeforge.cli.tables import inspect_tables, section_tables, weight_table
    from edgeforge.errors import CheckFailed
    from edgeforge.verification.verify import require_stored_weights
    from exporters.manifest import Manifest, check_files
    from exporters.registry import find_target
    from exporters.structure import to_json

    manifest = Manifest.read(artifact)
    problems = check_files(artifact, manifest)
    sections = () if problems else find_target(manifest.target).structure(artifact)
    if json:
        _print_json({**manifest.to_json(), "structure": to_json(sections), "problems": problems})
    else:
        source = manifest.source
        print(f"{artifact}: {manifest.target} from {source.model}, recipe {manifest.recipe}")
        print(
            f"context {manifest.context} tokens, {manifest.bits_per_weight:.3f} bits a weight, "
            f"checkpoint sha256 {source.sha256[:16]}"
        )
        for kind in ("inputs", "outputs"):
            shown = ", ".join(f"{k}: {v}" for k, v in getattr(manifest, kind).items())
            print(f"{kind}: {shown}")
        if manifest.rotation is not None:
            print(f"rotation: {manifest.rotation.name}, seed {manifest.rotation.seed}")
        print(f"states: {len(manifest.states)} caches")
        for note in manifest.notes:
            print(f"note: {note}")
        tables = [*inspect_tables(manifest), *section_tables(sections)]
        for table in [*tables, weight_table(manifest)] if weights else tables:
            _console().print(table)
    if problems:
        raise CheckFailed(f"{artifact}: {'; '.join(problems)}")
    require_stored_weights(artifact, manifest)
    if not json:
        print("all files are as written; integers and scales read back equal the store's")


@app.command()
def run(
    artifact: option.Artifact,
    prompt: option.Prompt,
    max_tokens: option.MaxTokens = 128,
    temperature: option.Temperature = 0.0,
    top_p: option.TopP = 1.0,
    seed: option.DrawSeed = 0,
    threads: option.Threads = None,
    json: option.Json = False,
) -> None:
    """Continue a text with an artifact, token by token."""
    from edgeforge.generation.generate import generate

    result = generate(
        artifact,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threads=threads,
        emit=None if json else _emit,
    )
    if json:
        _print_json(result.to_json())
    else:
        print()
        print(result.summary(), file=sys.stderr)


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
    threads: option.Threads = None,
    json: option.Json = False,
) -> None:
    """Describe a Core ML package, run it without Core ML, compare its outputs."""
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
        print("\n".join(lines))
    if compared:
        require_close(compared, tolerance)


@app.command(name="list")
def list_known(
    what: option.What,
    json: option.Json = False,
) -> None:
    """List what EdgeForge knows."""
    from edgeforge.cli.catalogue import catalogue

    rows = catalogue(what)
    if json:
        _print_json(rows)
        return
    width = max(map(len, rows), default=0)
    for name, about in rows.items():
        print(f"{name:<{width}}  {about}")


@app.command()
def synth(
    preset: option.Preset,
    out: option.Out,
    seed: option.WeightSeed = 0,
    force: option.Force = False,
    quiet: option.Quiet = False,
) -> None:
    """Write a checkpoint of random weights at a released model's true shape."""
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
    print(folder)


def main() -> None:
    """Runs the command line; errors meant for users become one line and an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    if hasattr(sys.stdout, "reconfigure"):  # a text that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    signals: list[int] = []
    try:
        with ended_by_signals(signals):
            _run_command(arguments or ["--help"])
            sys.stdout.flush()
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        number = signals[0] if signals else signal.SIGINT
        print("edgeforge: interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(128 + number)
    except BrokenPipeError:
        # Who read our results left, as `head` does; Python would complain when it flushes again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        if "--traceback" in sys.argv[1:]:
            import traceback

            traceback.print_exc()
        code, sentence = explained
        print(f"edgeforge: {one_line(sentence)}", file=sys.stderr)
        sys.exit(code)


def entry() -> None:
    """What the installed command calls: `main`, then an end without a slow farewell.

    All results are written by then; taking torch's modules apart one by one would cost a second.
    """
    try:
        main()
        code: int | str | None = 0
    except SystemExit as left:
        code = left.code
    if not isinstance(code, int | None):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def _run_command(arguments: list[str]) -> None:
    """What typer does beside this would hide Ctrl-C and some of our own bugs."""
    command = typer.main.get_command(app)
    with command.make_context("edgeforge", arguments) as context:
        command.invoke(context)


def _emit(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))


def _console() -> Console:
    from rich.console import Console

    # Not a terminal: wide enough for every table, so that nothing is cut in a log.
    return Console(width=None if sys.stdout.isatty() else 110)


if __name__ == "__main__":
    main()
