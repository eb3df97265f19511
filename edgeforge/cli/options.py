"""The options and arguments that commands take, as `edgeforge.cli.app` names them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Of several commands.
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Threads; by default one per processor, 4 at most."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that export wrote.")]

# Of `export`.
Model = Annotated[str, typer.Argument(help="A checkpoint folder, a hub id (org/name), or `demo`.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
Targets = Annotated[str, typer.Option(help="Targets, separated by commas.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A name from `edgeforge list recipes`, or a YAML file of rules; by default int4, "
        "or as-is for a checkpoint that is quantized already."
    ),
]
Rotation = Annotated[
    str | None,
    typer.Option(
        help="Rotate the weights before they are quantized, the outputs unchanged: a name from "
        "`edgeforge list rotations`, such as hadamard."
    ),
]
ImportedScales = Annotated[
    str,
    typer.Option(
        help="Of a checkpoint that is quantized already: float16 keeps its scales exactly, "
        "bfloat16 rounds them, which every target can hold."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(help="Declared context in tokens; by default the model's, 4096 at most."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Take the tokenizer from this folder, file or hub id instead."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option(help="A config.json field that you know not to change the maths."),
]
Strip = Annotated[bool, typer.Option("--strip", help="Leave out what only verification needs.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Where weights lie: `internal`, or `external` in a file of their own."),
]
Profile = Annotated[
    str | None, typer.Option(help="Core ML: the processor to shape for, gpu or ane.")
]
Chunk = Annotated[
    str | None,
    typer.Option(help="Core ML: tokens of a prefill call, or several such as 16,64,256."),
]
CacheWrite = Annotated[
    str | None, typer.Option(help="Core ML: how caches are written, slice or onehot.")
]
Opset = Annotated[str | None, typer.Option(help="Core ML: operators of ios18 or ios17.")]
Lowering = Annotated[
    str | None,
    typer.Option(help="Who lowers for ExecuTorch: edgeforge (the default) or stock."),
]
Backend = Annotated[
    str | None,
    typer.Option(help="ExecuTorch's delegate: xnnpack (the default), vulkan or coreml."),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        help="Dtype of the caches, fp32 (the default) or int8. ONNX: static scales, one for each "
        "head and column, from the --calibration text. ExecuTorch: one for each token and head. "
        "Core ML: float16 always."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="What the device has for the model, such as 3GB: refuse what needs more."),
]
BitsPerWeight = Annotated[
    float | None,
    typer.Option(help="Budget of a mixed recipe: stored bits over parameters, such as 4.5."),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        help="Budget of a mixed recipe: size of the stored weights, such as 1.8GB; graphs and "
        "tokenizer come on top."
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="Budget of a mixed recipe: KL divergence from the checkpoint on the calibration "
        "text, nats a token, such as 0.02."
    ),
]
SavePlan = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="Write the plan as a recipe that gives the same formats again.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|demo",
        help="Text that calibrated recipes, and int8 caches of ONNX, look at activations on; by "
        "default `demo`.",
    ),
]
CalibrationTokens = Annotated[int, typer.Option(min=1, help="How many tokens of it.")]
CalibrationLength = Annotated[
    int, typer.Option(min=1, help="Tokens of a sequence; the context at most.")
]
CalibrationSeed = Annotated[int, typer.Option(help="Which of its sequences are taken.")]
Resume = Annotated[
    Path | None,
    typer.Option(help="Folder of calibration's partial results, to go on from; else in the cache."),
]
Force = Annotated[bool, typer.Option(help="Replace an existing output folder.")]

# Of `verify`.
Artifacts = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Artifacts that export wrote.")
]
Text = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text to evaluate on; by default the demo's held-out text."),
]
Tokens = Annotated[int | None, typer.Option(min=2, help="How many tokens of it; by default all.")]
CheckpointPlace = Annotated[
    str | None, typer.Option(help="The checkpoint, if it is not where it was.")
]
Timed = Annotated[bool, typer.Option(help="Measure load, prefill, decode and memory.")]
InterpreterPrecision = Annotated[
    str | None,
    typer.Option(help="Of EdgeForge's interpreter of Core ML: fp16 (default) or fp32."),
]
ComputeUnits = Annotated[
    str | None,
    typer.Option(help="Of Core ML on a Mac: all (default), cpu, cpu-and-gpu or cpu-and-ne."),
]

# Of `inspect`.
EveryWeight = Annotated[bool, typer.Option("--weights", help="List every weight.")]

# Of `run`.
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", min=1, help="How many tokens at most.")
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens that hold this probability.")
]
DrawSeed = Annotated[
    int, typer.Option(min=0, help="Of the draws; the same seed gives the same text.")
]

# Of `coreml-run`.
Package = Annotated[
    Path, typer.Argument(metavar="PACKAGE", help="An .mlpackage, EdgeForge's or anybody's.")
]
Inputs = Annotated[
    list[Path] | None,
    typer.Option(help="An .npz file of inputs; several are calls in turn, states kept."),
]
Outputs = Annotated[
    list[Path] | None,
    typer.Option(help="Write outputs to this .npz file: one a call, or one for the last."),
]
Functions = Annotated[
    list[str] | None, typer.Option(help="Which function: one a call, or one for all.")
]
Precision = Annotated[
    str, typer.Option(help="fp16: round as the package's types say; fp32: round nothing.")
]
Compare = Annotated[
    Path | None, typer.Option(help="Hold the last outputs against those of this .npz file.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(min=0, help="Exit with 1 when they differ by more than this of their range."),
]
MaxIterations = Annotated[
    int | None, typer.Option(min=1, help="Of one loop of the program; by default 100000.")
]

# Of `list`.
What = Annotated[
    str, typer.Argument(help="families, recipes, rotations, targets, presets or coreml-operations")
]

# Of `synth`.
Preset = Annotated[str, typer.Argument(help="A name from `edgeforge list presets`.")]
WeightSeed = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]
