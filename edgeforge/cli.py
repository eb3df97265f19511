"""The command line: each command reads its options, calls one function and prints the result."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeforge.exits import ended_by_signals, explain, one_line

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="edgeforge",
    help="Compiles language models for phones: one trace, one quantization, proven artifacts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Threads = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Threads; by default one per processor, 4 at most."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that export wrote.")]


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose, not only what it is.")
    ] = False,
) -> None:
    """Options before the command; `main` reads them from the arguments themselves."""


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder, a hub id (org/name), or `demo`.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")],
    target: Annotated[str, typer.Option(help="Targets, separated by commas.")] = "onnx",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A name from `edgeforge list recipes`, or a YAML file of rules; by default int4, "
            "or as-is for a checkpoint that is quantized already."
        ),
    ] = None,
    imported_scales: Annotated[
        str,
        typer.Option(
            help="Of a checkpoint that is quantized already: float16 keeps its scales exactly, "
            "bfloat16 rounds them, which every target can hold."
        ),
    ] = "float16",
    context: Annotated[
        int | None,
        typer.Option(help="Declared context in tokens; by default the model's, 4096 at most."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Take the tokenizer from this folder, file or hub id instead."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    ignore_config: Annotated[
        list[str] | None,
        typer.Option(help="A config.json field that you know not to change the maths."),
    ] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave out what only verification needs.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="Where weights lie: `internal`, or `external` in a file of their own."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Core ML: the processor to shape for, gpu or ane.")
    ] = None,
    chunk: Annotated[
        str | None,
        typer.Option(help="Core ML: tokens of a prefill call, or several such as 16,64,256."),
    ] = None,
    cache_write: Annotated[
        str | None, typer.Option(help="Core ML: how caches are written, slice or onehot.")
    ] = None,
    opset: Annotated[str | None, typer.Option(help="Core ML: operators of ios18 or ios17.")] = None,
    lowering: Annotated[
        str | None,
        typer.Option(help="Who lowers for ExecuTorch: edgeforge (the default) or stock."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="ExecuTorch's delegate: xnnpack (the default), vulkan or coreml."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="What the device has for the model, such as 3GB: refuse what needs more."
        ),
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(help="Budget of a mixed recipe: stored bits over parameters, such as 4.5."),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help="Budget of a mixed recipe: size of the stored weights, such as 1.8GB; graphs and "
            "tokenizer come on top."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Budget of a mixed recipe: KL divergence from the checkpoint on the calibration "
            "text, nats a token, such as 0.02."
        ),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Write the plan as a recipe that gives the same formats again.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|demo",
            help="Text that calibrated recipes look at activations on; by default `demo`.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="How many tokens of it; by default 32768.")
    ] = None,
    calibration_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence; by default 512, the context at most."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which of its sequences are taken.")] = 0,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder of calibration's partial results, to go on from; else in the cache."
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing output folder.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Trace, quantize and write a model for one or more runtimes."""
    from edgeforge.calibration import CalibrationOptions
    from edgeforge.mixing import Budget
    from edgeforge.model import open_model
    from edgeforge.pipeline import ExportOptions
    from edgeforge.pipeline import export as run_export
    from edgeforge.planning import scale_name
    from edgeforge.progress import Reporter
    from edgeforge.show import parse_size, size_text
    from exporters.manifest import Manifest
    from exporters.options import TargetOptions
    from exporters.registry import find_target

    names = dict.fromkeys(name.strip() for name in target.split(","))
    targets = [find_target(name) for name in names]
    opened = open_model(
        model, revision=revision, tokenizer=tokenizer, ignore_config=ignore_config or ()
    )
    target_options = TargetOptions(
        strip=strip,
        weights=weights,
        profile=profile,
        chunk=chunk,
        cache_write=cache_write,
        opset=opset,
        lowering=lowering,
        backend=backend,
        max_memory=None if max_memory is None else parse_size(max_memory),
    )
    text = CalibrationOptions(
        calibration,
        calibration_tokens or CalibrationOptions.tokens,
        calibration_length or CalibrationOptions.length,
        seed,
    )
    options = ExportOptions(
        recipe,
        context,
        force,
        threads,
        target_options,
        text,
        resume,
        scale_name(imported_scales),
        Budget(bits_per_weight, None if max_size is None else parse_size(max_size), max_kl),
        save_plan,
    )
    with Reporter(quiet) as progress:
        folders = run_export(opened, targets, out, options, progress)
    for folder in folders:
        manifest = Manifest.read(folder)
        size = size_text(sum(record.size for record in manifest.files.values()))
        print(
            f"{folder}: {manifest.target}, {manifest.recipe}, context {manifest.context}, "
            f"{manifest.bits_per_weight:.3f} bits a weight, {size}"
        )


@app.command()
def verify(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Artifacts that export wrote.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to evaluate on; by default the demo's held-out text."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="How many tokens of it; by default all.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The checkpoint, if it is not where it was.")
    ] = None,
    timed: Annotated[bool, typer.Option(help="Measure load, prefill, decode and memory.")] = True,
    precision: Annotated[
        str | None,
        typer.Option(help="Of EdgeForge's interpreter of Core ML: fp16 (default) or fp32."),
    ] = None,
    compute_units: Annotated[
        str | None,
        typer.Option(help="Of Core ML on a Mac: all (default), cpu, cpu-and-gpu or cpu-and-ne."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run an artifact and report how right and how fast it is (also in report.json)."""
    from edgeforge.progress import Reporter
    from edgeforge.show import evaluation_tables, limit_lines
    from edgeforge.verification import VerifyOptions, find_artifacts
    from edgeforge.verification import verify as run_verify

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
    artifact: Artifact,
    weights: Annotated[bool, typer.Option("--weights", help="List every weight.")] = False,
    json: Json = False,
) -> None:
    """Show what an artifact holds and whether its files are as they were written."""
    from dataclasses import asdict

    from edgeforge.errors import CheckFailed
    from edgeforge.show import inspect_tables, section_tables, weight_table
    from edgeforge.verification import require_stored_weights
    from exporters.manifest import Manifest, check_files
    from exporters.registry import find_target
    from exporters.structure import to_json

    manifest = Manifest.read(artifact)
    problems = check_files(artifact, manifest)
    sections = () if problems else find_target(manifest.target).structure(artifact)
    if json:
        _print_json({**asdict(manifest), "structure": to_json(sections), "problems": problems})
    else:
        source = manifest.source
        print(f"{artifact}: {manifest.target} from {source['model']}, recipe {manifest.recipe}")
        print(
            f"context {manifest.context} tokens, {manifest.bits_per_weight:.3f} bits a weight, "
            f"checkpoint sha256 {str(source['sha256'])[:16]}"
        )
        for kind in ("inputs", "outputs"):
            shown = ", ".join(f"{k}: {v}" for k, v in getattr(manifest, kind).items())
            print(f"{kind}: {shown}")
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
    artifact: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="How many tokens at most.")
    ] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that hold this probability.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the draws; the same seed gives the same text.")
    ] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a text with an artifact, token by token."""
    from edgeforge.generate import generate

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
    package: Annotated[
        Path, typer.Argument(metavar="PACKAGE", help="An .mlpackage, EdgeForge's or anybody's.")
    ],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(help="An .npz file of inputs; several are calls in turn, states kept."),
    ] = None,
    outputs: Annotated[
        list[Path] | None,
        typer.Option(help="Write outputs to this .npz file: one a call, or one for the last."),
    ] = None,
    function: Annotated[
        list[str] | None, typer.Option(help="Which function: one a call, or one for all.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp16: round as the package's types say; fp32: round nothing.")
    ] = "fp16",
    compare: Annotated[
        Path | None, typer.Option(help="Hold the last outputs against those of this .npz file.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with 1 when they differ by more than this of their range."),
    ] = None,
    max_iterations: Annotated[
        int | None, typer.Option(min=1, help="Of one loop of the program; by default 100000.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Describe a Core ML package, run it without Core ML, compare its outputs."""
    from edgeforge.coreml_run import RunRequest, report, require_close

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
    what: Annotated[
        str, typer.Argument(help="families, recipes, targets, presets or coreml-operations")
    ],
    json: Json = False,
) -> None:
    """List what EdgeForge knows."""
    from edgeforge.catalogue import catalogue

    rows = catalogue(what)
    if json:
        _print_json(rows)
        return
    width = max(map(len, rows), default=0)
    for name, about in rows.items():
        print(f"{name:<{width}}  {about}")


@app.command()
def synth(
    preset: Annotated[str, typer.Argument(help="A name from `edgeforge list presets`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace an existing output folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint of random weights at a released model's true shape."""
    from edgeforge.progress import Reporter
    from edgeforge.synth import synthesise

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
