"""The options and arguments of commands; `edgeforge.cli.app` uses them by these names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _check_tokens(text: str | None) -> str | None:
    """Lets pass what `edgeforge.verification.sample.parse_tokens` reads."""
    from edgeforge.errors import UsageError
    from edgeforge.verification.sample import parse_tokens

    try:
        parse_tokens(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    return text


# Of several commands.
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Number of threads; by default one per processor, up to 4."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that export wrote.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
Force = Annotated[
    bool,
    typer.Option(help="Replace an output folder that EdgeForge wrote, every file of it."),
]

# Of `verify`.
Artifacts = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Artifacts that export wrote.")
]
Text = Annotated[
    Path | None,
    typer.Option(
        help='UTF-8 text to evaluate on, plain or .jsonl with documents under "text"; by default '
        "the demo model's held-out text."
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        metavar="N|all",
        callback=_check_tokens,
        help="Number of tokens of the text to use, spread over the whole text, or `all`; by "
        "default 8192, or 2048 for models over 50 M parameters.",
    ),
]
Bounds = Annotated[
    list[str] | None,
    typer.Option(
        "--bound",
        metavar="FIGURE=NUMBER",
        help="Bound of a figure in place of its default, such as lowering.kl_mean=0.01; repeat the "
        "option for further figures.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="transformers",
        help="Hold FLOAT against this program's logits of the same checkpoint, too.",
    ),
]
Full = Annotated[bool, typer.Option("--full", help="Print every figure, in two wide tables.")]
# Of `diagnose`.
DiagnoseTokens = Annotated[
    str | None,
    typer.Option(
        metavar="N|all",
        callback=_check_tokens,
        help="Number of tokens of the text to use, spread over it, or `all`; by default 512.",
    ),
]
DiagnoseWeights = Annotated[
    bool, typer.Option(help="Measure what each weight costs, which takes longest.")
]
DiagnoseFull = Annotated[bool, typer.Option("--full", help="List every matrix.")]
CheckpointPlace = Annotated[
    str | None,
    typer.Option(help="The checkpoint's folder, file or hub id, if it moved after the export."),
]
Timed = Annotated[
    bool, typer.Option(help="Measure the times of load, prefill and decode, and the memory.")
]
InterpreterPrecision = Annotated[
    str | None,
    typer.Option(
        help="Rounding of EdgeForge's Core ML interpreter: fp16 (the default) or fp32 (none)."
    ),
]
ComputeUnits = Annotated[
    str | None,
    typer.Option(
        help="Compute units of Core ML on a Mac: all (the default), cpu, cpu-and-gpu or cpu-and-ne."
    ),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Also run on this device, such as arm64:cortex-a76 (edgeforge devices lists them); "
        "give it several times for several.",
    ),
]
RunDevice = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Where to run: a name from `edgeforge devices`, by default this host."
    ),
]
Kleidiai = Annotated[
    str | None,
    typer.Option(
        help="Whether onnxruntime uses KleidiAI's kernels on arm64 devices: on, off or both (one "
        "after the other); by default as onnxruntime does."
    ),
]

# Of `check`.
Checked = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[DIR]...", help="Artifacts that export wrote; by default those the policy lists."
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What the artifacts must keep to; by default edgeforge-policy.yaml if it is there, "
        "else the targets' own bounds.",
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Earlier figures, to tell what got worse; by default the one the policy names.",
    ),
]
UpdateBaseline = Annotated[
    bool,
    typer.Option(
        "--update-baseline",
        help="Write the figures of the artifacts as the new baseline, if they keep to the policy.",
    ),
]
Speeds = Annotated[
    bool,
    typer.Option(
        "--timed/--no-timed",
        help="Whether to hold speeds against the reference runs that the policy names.",
    ),
]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JUnit XML.")]
Sarif = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the result as SARIF 2.1.0.")
]
Markdown = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the result, with the baseline, as Markdown."),
]
Github = Annotated[
    bool | None,
    typer.Option(
        "--github/--no-github",
        help="Print annotations for GitHub and append the Markdown to the job's summary; by "
        "default where GITHUB_ACTIONS is true.",
    ),
]

# Of `compare` and `report`.
Compared = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR|FILE...",
        help="Artifacts with reports, folders that hold such, or bench.json files; 2 or more.",
    ),
]
Reported = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[DIR]...",
        help="Artifacts, or folders that hold such; by default the current folder.",
    ),
]
Page = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write, one HTML file.")
]

# Of `inspect`.
EveryWeight = Annotated[bool, typer.Option("--weights", help="List every weight.")]

# Of `run`.
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", min=1, help="Largest number of tokens to generate.")
]
Temperature = Annotated[
    float, typer.Option(help="Divisor of the logits; 0 always takes the likeliest token.")
]
TopP = Annotated[
    float,
    typer.Option(help="Draw only from the likeliest tokens that add up to this probability."),
]
DrawSeed = Annotated[
    int, typer.Option(min=0, help="Seed of the draws; the same seed gives the same text.")
]
Speculate = Annotated[
    str | None,
    typer.Option(
        metavar="lookup|DIR",
        help="Run several tokens a call: `lookup` proposes what came after the same words earlier "
        "in the text, an artifact of a smaller model with the same tokenizer proposes what it "
        "would write. The artifact needs export --draft-positions.",
    ),
]
Draft = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens that are proposed at most; by default as many as the artifact takes.",
    ),
]
Ngram = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Longest run of last tokens that `lookup` looks up, then shorter ones; 3 by default.",
    ),
]

# Of `coreml-run`.
Package = Annotated[
    Path,
    typer.Argument(metavar="PACKAGE", help="An .mlpackage folder or .mlmodel file from any tool."),
]
Inputs = Annotated[
    list[Path] | None,
    typer.Option(
        help="An .npz file of inputs for one call; repeat the option for further calls, which keep "
        "the states."
    ),
]
Outputs = Annotated[
    list[Path] | None,
    typer.Option(
        help="An .npz file to write outputs to: one for each call, or one for the last call."
    ),
]
Functions = Annotated[
    list[str] | None,
    typer.Option(help="The function to call: one for each call, or one for all calls."),
]
Precision = Annotated[
    str,
    typer.Option(help="Rounding: fp16 rounds as the package's types say, fp32 rounds nothing."),
]
Compare = Annotated[
    Path | None,
    typer.Option(help="Compare the last call's outputs with those in this .npz file."),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Largest difference allowed with --compare, as a share of the values' range; the exit "
        "code is 1 if an output differs by more.",
    ),
]
InterpreterThreads = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Number of threads; by default PyTorch's own number."),
]
MaxIterations = Annotated[
    int | None,
    typer.Option(
        min=1, help="Largest number of iterations of all loops of a call; by default 100000."
    ),
]

# Of `list`.
What = Annotated[
    str,
    typer.Argument(
        help="What to list: families, recipes, rotations, targets, presets, phones "
        "or coreml-operations."
    ),
]

# Of `synth`.
Preset = Annotated[str, typer.Argument(help="A name from `edgeforge list presets`.")]
WeightSeed = Annotated[
    int, typer.Option(help="Seed of the weights; the same seed gives the same bytes.")
]
