"""Runs artifacts, on this host and elsewhere, and what they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

from device_harness.registry import taken_options
from edgeforge.model.model import Model
from edgeforge.stage_progress import Progress
from edgeforge.verification.bounds import Bound, Checked, bounds_of
from edgeforge.verification.each_session import Place
from edgeforge.verification.freshness import Freshness
from edgeforge.verification.references import references
from edgeforge.verification.rounding import rounds_activations, rounds_to_8_bits, worst_weights
from edgeforge.verification.sample import RANDOM_TOKENS, Sample, long_text
from edgeforge.verification.stored_weights import may_differ, unlike_store
from edgeforge.verification.verify_options import OnDevice, VerifyOptions
from exporters.manifest import Manifest

if TYPE_CHECKING:
    from device_harness.devices.device import Device, Facts
    from device_harness.session import Session
    from device_harness.timing import Timings
    from edgeforge.reference.walk import ReferenceRunner
    from edgeforge.verification.chosen_experts import RouterReader
    from edgeforge.verification.comparison import Comparison
    from edgeforge.verification.evaluation import Evaluation
    from edgeforge.verification.finite import NotFinite
    from edgeforge.verification.greedy import GreedyAgreement
    from edgeforge.verification.shipped import Shipped
    from edgeforge.verification.shipped_routing import ShippedRouting
    from quant.store.store import WeightStore

GREEDY_PROMPTS = 8
OF_THE_ARTIFACT: Final = frozenset({"stored_weights", "float.perplexity"})
"""Checks that no device changes: they are made once, with those of this host."""


@dataclass(frozen=True)
class Artifact:
    """An artifact to verify, and its place among those that were asked for."""

    place: int
    folder: Path
    manifest: Manifest
    freshness: Freshness


@dataclass(frozen=True)
class Opened:
    """A device that is open.

    Attributes:
        asked: what the user asked for.
        device: the device.
        facts: what is known of it.
        runs: the targets whose artifacts run there.
    """

    asked: OnDevice
    device: Device
    facts: Facts
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """An artifact, and where it runs: None for this host."""

    artifact: Artifact
    where: Opened | None = None


@dataclass(frozen=True)
class Group:
    """Artifacts that are held against the same references on the same tokens."""

    artifacts: list[Artifact]
    model: Model
    sample: Sample


@dataclass(frozen=True)
class _Measured:
    """What came out of one run."""

    run: Run
    session: Session
    figures: Comparison
    shipped: Shipped
    not_finite: dict[str, NotFinite]
    greedy: Sequence[GreedyAgreement]


def evaluate(
    group: Group,
    options: VerifyOptions,
    timings: Sequence[Timings | None],
    meant: Mapping[int, Sequence[Checked]],
    devices: Sequence[Opened],
    progress: Progress,
) -> list[Evaluation]:
    """Runs a group's artifacts and their references.

    Args:
        group: the artifacts.
        options: what the user asked for.
        timings: by the artifact's place.
        meant: the facts that were read from the files, by the artifact's place.
        devices: where the artifacts run too, as far as they do.
        progress: told of each stage.
    """
    from edgeforge.verification.adapted import judged_adapters, run_adapters
    from edgeforge.verification.against import check_against
    from edgeforge.verification.comparison import compare
    from edgeforge.verification.each_session import open_sessions, starting
    from edgeforge.verification.finite import located
    from edgeforge.verification.greedy import greedy_agreement, greedy_prompts
    from edgeforge.verification.routing import RoutingCounter
    from edgeforge.verification.shipped import score_shipped
    from edgeforge.verification.shipped_routing import with_shipped
    from edgeforge.verification.unigram import unigram_perplexity

    sample, context = group.sample, group.artifacts[0].manifest.context
    runs = [Run(artifact) for artifact in group.artifacts]
    runs += [
        Run(artifact, device)
        for device in sorted(devices, key=lambda device: device.facts.emulated)
        for artifact in group.artifacts
        if artifact.manifest.target in device.runs
    ]
    opening = open_sessions([_place(run) for run in runs], options.threads, options.runtime)
    with opening as sessions:
        with starting(sessions):
            made = references(group.artifacts[0].manifest, group.model, progress)
        reference, quantized = made.original, made.quantized
        further = []
        if options.against is not None:
            progress(f"against {options.against}", 0, 0)
            args = options.against, group.model, context, sample.blocks, reference
            further.append(check_against(*args))
        readers = _readers(runs, sessions, quantized)
        comparisons = compare(
            sample.blocks,
            reference,
            quantized,
            sessions,
            lambda done, size: progress("compare", done, size),
            readers,
        )
        shipped: list[Shipped] = []
        followed: list[ShippedRouting | None] = []
        for emulated, some in groupby(zip(runs, sessions, strict=True), lambda r: _emulated(r[0])):
            size, pairs = group.model.spec.num_parameters, list(some)
            scores, routings = score_shipped(
                long_text(sample, context, size, options.tokens, emulated=emulated),
                quantized,
                [session for _, session in pairs],
                lambda done, size: progress("shipped graphs", done, size),
                [run.artifact.manifest.draft_positions for run, _ in pairs],
                readers[len(shipped) : len(shipped) + len(pairs)],
            )
            shipped += scores
            followed += routings
        counters = [RoutingCounter() for _ in readers]
        agreements = greedy_agreement(
            greedy_prompts(sample.blocks, GREEDY_PROMPTS, context),
            sessions,
            [quantized, reference],
            lambda done, size: progress("generate", done, size),
            readers,
            counters,
        )
        if readers:
            comparisons = [
                replace(figures, routing=with_shipped(figures.routing, *given))
                for figures, given in zip(
                    comparisons, zip(followed, counters, readers, strict=True), strict=True
                )
            ]
        bad = [
            located(found.not_finite, sample.blocks, reference, quantized, session)
            for found, session in zip(comparisons, sessions, strict=True)
        ]
    adapted = {
        artifact.place: tuple(
            run_adapters(
                artifact.folder,
                artifact.manifest,
                group.model,
                made,
                sample.blocks,
                options.threads,
                options.runtime,
                progress,
            )
        )
        for artifact in group.artifacts
    }
    unigram = None
    if sample.text != RANDOM_TOKENS:
        unigram = unigram_perplexity(sample.whole, sample.blocks, group.model.spec.vocab_size)
    found: dict[int, Evaluation] = {}
    for each in zip(runs, sessions, comparisons, shipped, bad, agreements, strict=True):
        measured = _Measured(*each)
        artifact, where = measured.run.artifact, measured.run.where
        evaluation = _evaluation(measured, made.store, sample, unigram, options)
        if where is None:
            timed = timings[artifact.place]
            found[artifact.place] = replace(
                evaluation,
                runtime=evaluation.runtime if timed is None else timed.runtime,
                timings=timed,
                checks=(
                    *meant[artifact.place],
                    *further,
                    *evaluation.checks,
                    *judged_adapters(adapted[artifact.place], _bounds(artifact, options)),
                ),
                with_adapters=adapted[artifact.place],
                sums=measured.figures.sums,
                freshness=artifact.freshness,
                curve=measured.figures.curve,
            )
            continue
        there = replace(
            evaluation,
            checks=tuple(each for each in evaluation.checks if each.name not in OF_THE_ARTIFACT),
            device=where.asked.label,
            device_facts=where.facts.as_json(),
            device_limits=where.device.limits,
        )
        here = found[artifact.place]
        found[artifact.place] = replace(here, elsewhere=(*here.elsewhere, there))
    return [found[artifact.place] for artifact in group.artifacts]


def _readers(
    runs: Sequence[Run], sessions: Sequence[Session], quantized: ReferenceRunner
) -> list[RouterReader]:
    """What reads each artifact's choices of experts; empty where there is no mixture."""
    from edgeforge.verification.chosen_experts import RouterReader, artifact_routers

    routers = quantized.routers
    if not routers:
        return []
    found = {
        run.artifact.place: artifact_routers(run.artifact.folder, run.artifact.manifest)
        for run in runs
    }
    return [
        RouterReader(session, found[run.artifact.place], routers)
        for run, session in zip(runs, sessions, strict=True)
    ]


def _emulated(run: Run) -> bool:
    return run.where is not None and run.where.facts.emulated


def _place(run: Run) -> Place:
    """What opens a run's session."""
    artifact, where = run.artifact, run.where
    if where is None:
        return Place(artifact.folder, artifact.manifest)
    runtime = taken_options(artifact.manifest.target, where.asked.runtime)
    return Place(artifact.folder, artifact.manifest, where.device, runtime)


def _bounds(artifact: Artifact, options: VerifyOptions) -> dict[str, Bound]:
    """The bounds of an artifact's figures."""
    manifest = artifact.manifest
    return bounds_of(
        manifest.target,
        options.bounds,
        rounds=rounds_to_8_bits(manifest),
        bits=manifest.bits_per_weight,
    )


def _evaluation(
    measured: _Measured,
    store: WeightStore,
    sample: Sample,
    unigram: float | None,
    options: VerifyOptions,
) -> Evaluation:
    """The evaluation of one run."""
    from edgeforge.verification.evaluation import Evaluation
    from edgeforge.verification.judged import Found, judged

    manifest, figures = measured.run.artifact.manifest, measured.figures
    unlike = unlike_store(manifest, store)
    other, rounds = may_differ(manifest, unlike), rounds_activations(manifest)
    bounds = _bounds(measured.run.artifact, options)
    greedy_quantized, greedy_float = measured.greedy
    found = Found(
        figures=figures,
        shipped=measured.shipped,
        greedy=greedy_quantized,
        not_finite=measured.not_finite,
        unlike=unlike,
        store=str(store.folder),
        other_processor=other,
        unigram=unigram,
        activations=str(manifest.options.get("activations", "auto")) if rounds else "",
        worst_weights=worst_weights(manifest),
    )
    return Evaluation(
        target=manifest.target,
        recipe=manifest.recipe,
        runtime=measured.session.runtime,
        text=sample.text,
        tokens=sample.tokens,
        block=max(map(len, sample.blocks)),
        text_tokens=sample.available,
        perplexity=figures.perplexity,
        quantization=figures.quantization,
        lowering=figures.lowering,
        shipped=measured.shipped,
        total=figures.total,
        intervals=figures.intervals,
        not_finite=measured.not_finite,
        greedy_quantized=greedy_quantized,
        greedy_float=greedy_float,
        stored_weights_equal=not unlike,
        bits_per_weight=manifest.bits_per_weight,
        artifact_bytes=sum(record.size for record in manifest.files.values()),
        timings=None,
        limits=measured.session.limits,
        weights_unlike_store=unlike,
        weight_store=str(store.folder),
        other_processor=other,
        rounds_activations=rounds,
        exit_layer=manifest.model.exit_layer,
        adapters=tuple(record.name for record in manifest.merged_adapters),
        checks=tuple(judged(found, bounds, options.bounds)),
        routing=figures.routing,
    )
