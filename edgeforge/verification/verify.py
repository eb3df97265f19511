"""Verifies an artifact: its files, its stored weights, its logits, its speed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.errors import CheckFailed, UsageError
from edgeforge.model.model import CALIBRATION_TEXT, DEMO, DEMO_FOLDER, HELDOUT, Model, open_model
from edgeforge.tokenizer import Tokenizer, read_text, split_blocks
from exporters.manifest import MANIFEST, Manifest, check_files
from exporters.manifest_records import CalibrationRecord
from exporters.registry import find_target
from quant.formats.activations import parse_activation
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan

if TYPE_CHECKING:
    from edgeforge.reference.walk import ReferenceRunner
    from edgeforge.verification.evaluation import Evaluation

Progress = Callable[[str, int, int], None]

BLOCK_TOKENS = 512
# A text of this many tokens takes minutes on a model this large: less is the default there.
LARGE_MODEL, LARGE_MODEL_TOKENS = 50_000_000, 2048
_GREEDY_PROMPTS = 8


@dataclass(frozen=True)
class VerifyOptions:
    """What a user asks of a verification.

    Attributes:
        text: a UTF-8 file; None for the demo model's held-out text.
        tokens: how many tokens of it; None for all (2,048 for models over 50 M parameters).
        checkpoint: where the checkpoint is now; None for where the manifest says.
        threads: for the runtime; None for its default here.
        timed: whether to time the artifact too.
        runtime: options of the runtime, by name; None leaves it its default.
    """

    text: Path | None = None
    tokens: int | None = None
    checkpoint: str | None = None
    threads: int | None = None
    timed: bool = True
    runtime: Mapping[str, str | None] = field(default_factory=dict)


def verify(
    folder: Path,
    options: VerifyOptions,
    progress: Progress = lambda stage, done, size: None,
) -> Evaluation:
    """Runs every check on an artifact and writes ``report.json`` into it.

    Args:
        folder: the artifact.
        options: what the user asked for.
        progress: told of each stage.

    Raises:
        CheckFailed: files were changed, or their integers and scales are not the store's.
        EdgeForgeError: or an ExportError or DeviceError: it could not be verified.
    """
    manifest = Manifest.read(folder)
    progress("files", 0, 0)
    problems = check_files(folder, manifest)
    if problems:
        raise CheckFailed(f"{folder}: {'; '.join(problems)}")
    progress("stored weights", 0, 0)
    require_stored_weights(folder, manifest)
    model = reopen(manifest, options.checkpoint)
    blocks, text = _blocks(folder, manifest, model, options)

    from device_harness.registry import open_session
    from device_harness.timing import time_artifact
    from edgeforge.verification.evaluation import (
        Evaluation,
        compare,
        greedy_agreement,
        greedy_prompts,
    )

    timings = None
    if options.timed:
        progress("time", 0, 0)
        timings = time_artifact(folder, threads=options.threads, options=options.runtime)
    reference, quantized = _references(manifest, model, progress)
    with open_session(folder, manifest, options.threads, options.runtime) as session:
        progress("compare", 0, len(blocks))
        figures = compare(
            blocks,
            reference,
            quantized,
            session,
            lambda done, size: progress("compare", done, size),
        )
        progress("generate", 0, 0)
        prompts = greedy_prompts(blocks, _GREEDY_PROMPTS, manifest.context)
        greedy_quantized, greedy_float = greedy_agreement(prompts, session, [quantized, reference])
    evaluation = Evaluation(
        target=manifest.target,
        recipe=manifest.recipe,
        runtime=session.runtime,
        text=text,
        tokens=sum(map(len, blocks)),
        block=max(map(len, blocks)),
        perplexity=figures.perplexity,
        quantization=figures.quantization,
        lowering=figures.lowering,
        total=figures.total,
        greedy_quantized=greedy_quantized,
        greedy_float=greedy_float,
        stored_weights_equal=True,
        bits_per_weight=manifest.bits_per_weight,
        artifact_bytes=sum(record.size for record in manifest.files.values()),
        timings=timings,
        limits=session.limits,
    )
    evaluation.write(folder)
    return evaluation


def find_artifacts(folders: list[Path]) -> list[Path]:
    """Artifacts in folders: each itself, or those right inside it, as one per target."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        found.extend(inside if inside and not (folder / MANIFEST).is_file() else [folder])
    return found


def require_stored_weights(folder: Path, manifest: Manifest) -> None:
    """Reads integers and scales back out of the files and holds them against the manifest's.

    Raises:
        CheckFailed: a weight is absent or differs.
    """
    found = find_target(manifest.target).stored_digests(folder)
    for name, record in manifest.weights.items():
        if found.get(name) != record.digest:
            state = "differs from" if name in found else "is absent, unlike in"
            raise CheckFailed(f"{folder}: {name} {state} the weight store it was written from")


def reopen(manifest: Manifest, checkpoint: str | None) -> Model:
    """Opens the checkpoint an artifact was made of, and makes sure that it is the same one.

    Raises:
        UsageError: it is another checkpoint.
        CheckpointError: it is not there.
    """
    source = manifest.source
    where, revision = checkpoint or source.path, None
    if source.model == str(DEMO_FOLDER) and checkpoint is None:
        where = DEMO
    elif checkpoint is None and not Path(where).is_dir() and source.revision:
        where, revision = source.model, source.revision
    model = open_model(where, revision=revision, ignore_config=manifest.model.ignored_config)
    digest = model.checkpoint.digest()
    if digest.sha256 != source.sha256:
        raise UsageError(
            f"{where} is not the checkpoint that the artifact was made of (its digest differs): "
            f"name the right one with --checkpoint"
        )
    return model


def _blocks(
    folder: Path, manifest: Manifest, model: Model, options: VerifyOptions
) -> tuple[list[list[int]], str]:
    """The tokens to evaluate on, and what to call them."""
    length = min(BLOCK_TOKENS, manifest.context)
    spec = model.spec
    limit = options.tokens
    if limit is None and spec.num_parameters > LARGE_MODEL:
        limit = LARGE_MODEL_TOKENS
    file = folder / "tokenizer.json"
    if not file.is_file() and options.text is None:
        draw = random.Random(0)
        tokens = [draw.randrange(spec.vocab_size) for _ in range(limit or LARGE_MODEL_TOKENS)]
        return split_blocks(tokens, length, spec.bos), "seeded random tokens (no tokenizer)"
    path = options.text or HELDOUT
    tokens = Tokenizer(file, str(folder)).encode(read_text(path), special=False)
    if len(tokens) < 2:
        raise UsageError(f"{path} has {len(tokens)} tokens; at least 2 are needed")
    if max(tokens) >= spec.vocab_size:
        raise UsageError(
            f"the tokenizer gives token {max(tokens)}, but the model has {spec.vocab_size}: it is "
            f"another model's; export again with --tokenizer PATH"
        )
    if manifest.calibration is not None and path != HELDOUT:
        _refuse_calibration_text(manifest.calibration, path)
    label = "the demo model's held-out text" if path == HELDOUT else path.name
    return split_blocks(tokens, length, spec.bos, limit), label


def _refuse_calibration_text(record: CalibrationRecord, path: Path) -> None:
    """Refuses a text that the artifact was calibrated on; one that is gone cannot be compared."""
    from edgeforge.calibration.text import Calibration, shared_passage

    calibration = Calibration.recorded(record)
    if calibration.source != DEMO and not Path(calibration.source).is_file():
        return
    source = CALIBRATION_TEXT if calibration.source == DEMO else Path(calibration.source)
    if shared_passage(read_text(path), read_text(source)) is not None:
        raise UsageError(
            f"{path} shares a passage with the text that the artifact was calibrated on "
            f"({calibration.source}), so it would be judged by what it has seen: evaluate on "
            f"another text"
        )


def _references(
    manifest: Manifest, model: Model, progress: Progress
) -> tuple[ReferenceRunner, ReferenceRunner]:
    """FLOAT from the checkpoint and QUANTIZED from the store, which may be of rotated weights."""
    from edgeforge.calibration.text import Calibration, CalibrationRun
    from edgeforge.model.rotated_weights import recorded_rotation
    from edgeforge.model.trace import trace
    from edgeforge.reference.walk import ReferenceRunner, store_reader
    from edgeforge.weight_store import quantize
    from quant.program.rewrite import quantize_program

    plan = QuantPlan(
        manifest.recipe,
        {
            name: Assignment(
                parse_format(record.format), record.algorithm, parse_activation(record.activation)
            )
            for name, record in manifest.weights.items()
        },
        "" if manifest.rotation is None else manifest.rotation.name,
    )
    original = program = trace(model.spec, manifest.context)
    stored = model
    if manifest.rotation is not None:
        rotated = recorded_rotation(model, manifest.rotation, manifest.context)
        stored, program = rotated.model, rotated.program
    run = None
    if manifest.calibration is not None:
        calibration = Calibration.recorded(manifest.calibration)
        run = CalibrationRun(stored, calibration, lambda: program)
    store = quantize(stored.weights, model.checkpoint.digest(), plan, None, progress, run)
    reference = ReferenceRunner(
        original,
        lambda given: model.weights.float_weight(given.name),
        model.weights.float_rows,
    )
    return reference, ReferenceRunner(quantize_program(program, plan), store_reader(store))
