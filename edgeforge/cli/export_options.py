"""The options and arguments of ``export``; ``plan`` has some of them too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A checkpoint folder, a GGUF file, a hub id (org/name), or `demo`.")
]
Targets = Annotated[str, typer.Option(help="Targets, separated by commas.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A name from `edgeforge list recipes`, or a YAML file of rules; by default int4-gptq "
        "for models under 1 billion parameters, int4 for larger ones, and as-is for a checkpoint "
        "that is quantized already."
    ),
]
Rotation = Annotated[
    str | None,
    typer.Option(
        help="Rotate the weights before they are quantized, which keeps the float model's outputs: "
        "a name from `edgeforge list rotations`, such as hadamard."
    ),
]
ImportedScales = Annotated[
    str,
    typer.Option(
        help="Dtype of the scales of a checkpoint that is quantized already: float16 keeps them "
        "exactly, bfloat16 rounds them, and every target can store bfloat16."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(help="Declared context in tokens; by default the model's, at most 4096."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Take the tokenizer from this folder, file or hub id instead."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option(help="A config.json field to ignore, because it does not change the maths."),
]
Strip = Annotated[bool, typer.Option("--strip", help="Leave out what only verification needs.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="ExecuTorch: where weights are stored, `internal` (the default), or `external` in a "
        "file of their own."
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(help="Core ML: processor to lay out for, gpu (the default) or ane."),
]
Chunk = Annotated[
    str | None,
    typer.Option(
        help="Core ML: tokens of one prefill call (64 by default), or several sizes such as "
        "16,64,256."
    ),
]
CacheWrite = Annotated[
    str | None,
    typer.Option(help="Core ML: how caches are written, slice (the default for ios18) or onehot."),
]
Opset = Annotated[
    str | None,
    typer.Option(help="Core ML: operators of ios18 (the default) or ios17."),
]
Lowering = Annotated[
    str | None,
    typer.Option(
        help="ExecuTorch: the code that lowers the program, edgeforge (the default) or stock."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(help="ExecuTorch: the delegate, xnnpack (the default), vulkan or coreml."),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        help="Dtype of the caches, fp32 (the default) or int8. With int8, ONNX uses static scales "
        "from the --calibration text, one for each head and column; ExecuTorch uses one for each "
        "token and head. Core ML always uses float16."
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="How products of ONNX and ExecuTorch take their activations: auto (the default) "
        "rounds them to 8 bits but for a few large columns of some matrices, int8 rounds all, "
        "float rounds none and is much slower."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory that the device has for the model, such as 3GB; a model that needs more is "
        "refused."
    ),
]
DraftPositions = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Also write a graph that gives the logits of the last K tokens of a call, which "
        "speculative decoding needs; with 1 (the default) there is none.",
    ),
]
ExitLayer = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Cut the model after this layer, counted from 1; the last norm and the head follow "
        "it. For models that were trained to exit early (LayerSkip).",
    ),
]
BitsPerWeight = Annotated[
    float | None,
    typer.Option(help="Budget of a mixed recipe: stored bits divided by parameters, such as 4.5."),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        help="Budget of a mixed recipe: size of the stored weights, such as 1.8GB, without graphs "
        "and tokenizer."
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="Budget of a mixed recipe: KL divergence from the checkpoint on the calibration "
        "text in nats per token, such as 0.02."
    ),
]
SavePlan = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="Write the plan as a recipe that gives the same formats again.",
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate/--no-calibration",
        help="Whether the default recipe may look at a calibration text; without it, it is int4.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|demo|self",
        help="Text on which activations are collected for calibrated recipes and for int8 caches "
        "of ONNX; `self` is what the model itself writes; by default `demo`, the text that ships.",
    ),
]
CalibrationTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of tokens of the calibration text to use; by default 8192, or 32768 from a "
        "billion parameters on.",
    ),
]
CalibrationLength = Annotated[
    int, typer.Option(min=1, help="Tokens of each calibration sequence, at most the context.")
]
CalibrationSeed = Annotated[int, typer.Option(help="Seed of the draw of calibration sequences.")]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Folder of calibration's partial results, from which an interrupted run resumes: an "
        "empty one at first; by default one in the cache."
    ),
]
