"""Verifies artifacts: their files, their stored weights, their logits, their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.errors import CheckFailed, UsageError
from edgeforge.model.model import DEMO, DEMO_FOLDER, Model, open_model
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.verification.bounds import Checked, bounds_of, check_bound
from edgeforge.verification.freshness import Freshness, freshness_of
from edgeforge.verification.rounding import rounds_activations, rounds_to_8_bits, worst_weights
from edgeforge.verification.sample import (
    LARGE_MODEL,
    RANDOM_TOKENS,
    Sample,
    TokenCount,
    check_tokens,
    choose_sample,
    long_text,
)
from edgeforge.verification.soundness import require_sound
from edgeforge.verification.stored_weights import may_differ, require_recorded_weights, unlike_store
from exporters.manifest import Manifest, check_files
from quant.formats.activations import parse_activation
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan

if TYPE_CHECKING:
    from device_harness.timing import Timings
    from edgeforge.reference.walk import ReferenceRunner
    from edgeforge.verification.evaluation import Evaluation
    from quant.program.program import Program
    from quant.store.store import WeightStore

GREEDY_PROMPTS = 8


@dataclass(frozen=True)
class VerifyOptions:
    """What a user asks of a verification.

    Attributes:
        text: a UTF-8 file; None for the demo model's held-out text.
        tokens: how many tokens of it, spread over the whole text, or ``all``; None for 8,192
            (2,048 for models over 50 M parameters).
        checkpoint: where the checkpoint is now; None for where the manifest says.
        threads: for the runtime; None for its default here.
        timed: whether to time the artifact too.
        runtime: options of the runtime, by name; None leaves it its default.
        bounds: of figures, by their names, instead of the target's own.
        against: a program of others that FLOAT is held against; None for none.
    """

    text: Path | None = None
    tokens: TokenCount | None = None
    checkpoint: str | None = None
    threads: int | None = None
    timed: bool = True
    runtime: Mapping[str, str | None] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    against: str | None = None


@dataclass(frozen=True)
class _Artifact:
    """An artifact to verify, and its place among those that were asked for."""

    place: int
    folder: Path
    manifest: Manifest
    freshness: Freshness


@dataclass(frozen=True)
class _Group:
    """Artifacts that are held against the same references on the same tokens."""

    artifacts: list[_Artifact]
    model: Model
    sample: Sample


@dataclass(frozen=True)
class References:
    """What an artifact is held against.

    Attributes:
        original: FLOAT.
        quantized: QUANTIZED.
        store: the weight store that QUANTIZED reads.
        model: the model whose weights were quantized: the rotated one if one was.
        program: its program, in the float dialect.
    """

    original: ReferenceRunner
    quantized: ReferenceRunner
    store: WeightStore
    model: Model
    program: Program


def verify(folder: Path, options: VerifyOptions, progress: Progress = no_progress) -> Evaluation:
    """Runs every check on an artifact and writes ``report.json`` into it.

    Args:
        folder: the artifact.
        options: what the user asked for.
        progress: told of each stage.

    Raises:
        CheckFailed: files were changed, or their integers and scales are not what the manifest
            records.
        UnsoundError: a check failed after the artifact ran; it has the evaluation.
        EdgeForgeError: or an ExportError or DeviceError: it could not be verified.
    """
    found = verify_together([folder], options, progress)
    require_sound([folder], found)
    return found[0]


def verify_together(
    folders: Sequence[Path], options: VerifyOptions, progress: Progress = no_progress
) -> list[Evaluation]:
    """Runs every check on several artifacts and writes ``report.json`` into each.

    FLOAT and QUANTIZED run once for all artifacts of one export. The files and stored weights of
    all are checked before any is run: that takes a second, the rest may take minutes.

    Args:
        folders: the artifacts.
        options: what the user asked for.
        progress: told of each stage.

    Returns:
        One evaluation for each folder, in order; `require_sound` says which did not pass.

    Raises:
        CheckFailed: files were changed, or their integers and scales are not what the manifest
            records.
        EdgeForgeError: or an ExportError or DeviceError: one could not be verified.
    """
    from device_harness.timing import time_artifact
    from edgeforge.cards.write import write_cards
    from edgeforge.verification.against import check_program
    from edgeforge.verification.for_card import for_card
    from edgeforge.verification.meaning.check import check_meaning, told_before
    from edgeforge.verification.report_file import REPORT

    check_tokens(options.tokens)
    for name, limit in options.bounds.items():
        check_bound(name, limit)
    if options.against is not None:
        check_program(options.against)
    if options.text is not None:
        text = [Input("the text", options.text)]
        for folder in folders:
            refuse_inputs(folder / REPORT, text, "the report")
    artifacts = [_open(place, folder, options) for place, folder in enumerate(folders)]
    progress("files", 0, 0)
    for artifact in artifacts:
        problems = check_files(artifact.folder, artifact.manifest)
        if problems:
            raise CheckFailed(f"{artifact.folder}: {'; '.join(problems)}")
    progress("stored weights", 0, 0)
    for artifact in artifacts:
        require_recorded_weights(artifact.folder, artifact.manifest)
    groups = _grouped(artifacts, options)
    # Read before anything runs: what is otherwise may keep an artifact from running.
    meant = {
        artifact.place: check_meaning(artifact.folder, artifact.manifest, group.model)
        for group in groups
        for artifact in group.artifacts
    }
    with told_before({folders[place]: checks for place, checks in meant.items()}):
        timings: list[Timings | None] = [None for _ in artifacts]
        if options.timed:
            # One at a time, before anything else runs: they would share the processors.
            for artifact in artifacts:
                progress("time", artifact.place, len(artifacts))
                timings[artifact.place] = time_artifact(
                    artifact.folder, threads=options.threads, options=options.runtime
                )
        found: dict[int, Evaluation] = {}
        for group in groups:
            evaluations = _evaluate(group, options, timings, meant, progress)
            # Figures of a checkpoint that changed meanwhile would be those of no checkpoint at all.
            group.model.checkpoint.require_unchanged()
            for artifact, evaluation in zip(group.artifacts, evaluations, strict=True):
                evaluation.write(artifact.folder)
                write_cards(
                    artifact.folder,
                    artifact.manifest,
                    group.model.checkpoint,
                    for_card(evaluation),
                )
                found[artifact.place] = evaluation
    return [found[artifact.place] for artifact in artifacts]


def _open(place: int, folder: Path, options: VerifyOptions) -> _Artifact:
    """Reads a manifest; what all depends on is taken down before any of it is used."""
    manifest = Manifest.read(folder)
    freshness = freshness_of(
        folder,
        manifest,
        text=options.text,
        tokens=options.tokens,
        bounds=options.bounds,
        options=options.runtime,
    )
    return _Artifact(place, folder, manifest, freshness)


def _grouped(artifacts: list[_Artifact], options: VerifyOptions) -> list[_Group]:
    """Puts together what can be held against the same references."""
    alike: dict[str, list[_Artifact]] = {}
    for artifact in artifacts:
        alike.setdefault(_reference_key(artifact.manifest), []).append(artifact)
    groups = []
    for members in alike.values():
        first = members[0]
        model = reopen(first.manifest, options.checkpoint)
        sample = choose_sample(
            first.folder,
            model.spec,
            first.manifest.context,
            options.text,
            options.tokens,
            first.manifest.calibration,
        )
        # Loaded, a large model's artifact takes gigabytes: only one is open at a time.
        apart = model.spec.num_parameters > LARGE_MODEL
        parts = [[member] for member in members] if apart else [members]
        groups += [_Group(part, model, sample) for part in parts]
    return groups


def _reference_key(manifest: Manifest) -> str:
    """All that FLOAT, QUANTIZED and the tokens depend on, as a text."""
    plan = {
        name: (record.format, record.algorithm, record.activation)
        for name, record in manifest.weights.items()
    }
    return repr(
        (
            manifest.source,
            manifest.model.ignored_config,
            manifest.context,
            manifest.recipe,
            plan,
            manifest.rotation,
            manifest.calibration,
            manifest.tokenizer_sha256,
        )
    )


def _evaluate(
    group: _Group,
    options: VerifyOptions,
    timings: Sequence[Timings | None],
    meant: Mapping[int, Sequence[Checked]],
    progress: Progress,
) -> list[Evaluation]:
    """Runs a group's artifacts and their references."""
    from edgeforge.verification.against import check_against
    from edgeforge.verification.comparison import compare
    from edgeforge.verification.each_session import open_sessions, starting
    from edgeforge.verification.evaluation import Evaluation
    from edgeforge.verification.finite import located
    from edgeforge.verification.greedy import greedy_agreement, greedy_prompts
    from edgeforge.verification.judged import Found, judged
    from edgeforge.verification.shipped import score_shipped
    from edgeforge.verification.unigram import unigram_perplexity

    sample, context = group.sample, group.artifacts[0].manifest.context
    opening = open_sessions(
        [(artifact.folder, artifact.manifest) for artifact in group.artifacts],
        options.threads,
        options.runtime,
    )
    with opening as sessions:
        with starting(sessions):
            made = references(group.artifacts[0].manifest, group.model, progress)
        reference, quantized, store = made.original, made.quantized, made.store
        further = []
        if options.against is not None:
            progress(f"against {options.against}", 0, 0)
            args = options.against, group.model, context, sample.blocks, reference
            further.append(check_against(*args))
        comparisons = compare(
            sample.blocks,
            reference,
            quantized,
            sessions,
            lambda done, size: progress("compare", done, size),
        )
        shipped = score_shipped(
            long_text(sample, context, group.model.spec.num_parameters, options.tokens),
            quantized,
            sessions,
            lambda done, size: progress("shipped graphs", done, size),
        )
        agreements = greedy_agreement(
            greedy_prompts(sample.blocks, GREEDY_PROMPTS, context),
            sessions,
            [quantized, reference],
            lambda done, size: progress("generate", done, size),
        )
        bad = [
            located(found.not_finite, sample.blocks, reference, quantized, session)
            for found, session in zip(comparisons, sessions, strict=True)
        ]
    unigram = None
    if sample.text != RANDOM_TOKENS:
        unigram = unigram_perplexity(sample.whole, sample.blocks, group.model.spec.vocab_size)
    evaluations = []
    for artifact, session, figures, score, not_finite, (greedy_quantized, greedy_float) in zip(
        group.artifacts, sessions, comparisons, shipped, bad, agreements, strict=True
    ):
        unlike = unlike_store(artifact.manifest, store)
        manifest, timed = artifact.manifest, timings[artifact.place]
        other, rounds = may_differ(manifest, unlike), rounds_activations(manifest)
        bounds = bounds_of(
            manifest.target,
            options.bounds,
            rounds=rounds_to_8_bits(manifest),
            bits=manifest.bits_per_weight,
        )
        found = Found(
            figures=figures,
            shipped=score,
            greedy=greedy_quantized,
            not_finite=not_finite,
            unlike=unlike,
            store=str(store.folder),
            other_processor=other,
            unigram=unigram,
            activations=str(manifest.options.get("activations", "auto")) if rounds else "",
            worst_weights=worst_weights(manifest),
        )
        evaluations.append(
            Evaluation(
                target=manifest.target,
                recipe=manifest.recipe,
                runtime=session.runtime if timed is None else timed.runtime,
                text=sample.text,
                tokens=sample.tokens,
                block=max(map(len, sample.blocks)),
                text_tokens=sample.available,
                perplexity=figures.perplexity,
                quantization=figures.quantization,
                lowering=figures.lowering,
                shipped=score,
                total=figures.total,
                intervals=figures.intervals,
                not_finite=not_finite,
                greedy_quantized=greedy_quantized,
                greedy_float=greedy_float,
                stored_weights_equal=not unlike,
                bits_per_weight=manifest.bits_per_weight,
                artifact_bytes=sum(record.size for record in manifest.files.values()),
                timings=timed,
                limits=session.limits,
                weights_unlike_store=unlike,
                weight_store=str(store.folder),
                other_processor=other,
                rounds_activations=rounds,
                checks=(
                    *meant[artifact.place],
                    *further,
                    *judged(found, bounds, options.bounds),
                ),
                sums=figures.sums,
                freshness=artifact.freshness,
                curve=figures.curve,
            )
        )
    return evaluations


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


def references(manifest: Manifest, model: Model, progress: Progress) -> References:
    """FLOAT from the checkpoint, QUANTIZED from the store, found in the cache or made now."""
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
    return References(
        original=reference,
        quantized=ReferenceRunner(quantize_program(program, plan), store_reader(store)),
        store=store,
        model=stored,
        program=program,
    )
