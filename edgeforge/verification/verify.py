"""Verifies artifacts: their files, their stored weights, their logits, their speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from device_harness.devices.registry import KINDS, kind_of, open_device
from edgeforge.errors import CheckFailed, UsageError
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.verification.bounds import check_bound
from edgeforge.verification.evaluate import Artifact, Group, Opened, evaluate
from edgeforge.verification.freshness import freshness_of
from edgeforge.verification.references import reopen
from edgeforge.verification.sample import LARGE_MODEL, check_tokens, choose_sample
from edgeforge.verification.soundness import require_sound
from edgeforge.verification.stored_weights import require_recorded_weights
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import Manifest, check_files

if TYPE_CHECKING:
    from device_harness.timing import Timings
    from edgeforge.verification.evaluation import Evaluation

EMULATED_TOKENS: Final = 1024
"""Tokens by default where a processor is emulated: 8,192 would take a quarter of an hour."""


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
    from edgeforge.verification.against import check_program
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
    if not options.devices:
        return _verified(folders, options, (), progress)
    with _open_devices(options, progress) as devices:
        if options.tokens is None and any(each.facts.emulated for each in devices):
            options = replace(options, tokens=EMULATED_TOKENS)
        return _verified(folders, options, devices, progress)


def _verified(
    folders: Sequence[Path],
    options: VerifyOptions,
    devices: Sequence[Opened],
    progress: Progress,
) -> list[Evaluation]:
    """As `verify_together`, with the devices open."""
    from device_harness.timing import time_artifact
    from edgeforge.cards.write import write_cards
    from edgeforge.verification.for_card import for_card
    from edgeforge.verification.meaning.check import check_meaning, told_before

    artifacts = [_open(place, folder, options) for place, folder in enumerate(folders)]
    _require_targets(artifacts, devices)
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
            evaluations = evaluate(group, options, timings, meant, devices, progress)
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


def _open(place: int, folder: Path, options: VerifyOptions) -> Artifact:
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
    return Artifact(place, folder, manifest, freshness)


@contextmanager
def _open_devices(options: VerifyOptions, progress: Progress) -> Iterator[list[Opened]]:
    """Opens the devices that were asked for, each once, and closes them at the end."""
    with ExitStack() as stack:
        known = {}
        for name in dict.fromkeys(asked.name for asked in options.devices):
            device = stack.enter_context(open_device(name, progress=progress))
            known[name] = device, device.facts(), KINDS[kind_of(name)].targets
        yield [Opened(asked, *known[asked.name]) for asked in options.devices]


def _require_targets(artifacts: Sequence[Artifact], devices: Sequence[Opened]) -> None:
    """Refuses a device on which none of the artifacts runs.

    Raises:
        UsageError: says what runs there.
    """
    for device in devices:
        if not any(artifact.manifest.target in device.runs for artifact in artifacts):
            given = ", ".join(dict.fromkeys(each.manifest.target for each in artifacts))
            raise UsageError(
                f"{given} artifacts do not run on {device.asked.name}, which runs those for "
                f"{', '.join(device.runs)}"
            )


def _grouped(artifacts: list[Artifact], options: VerifyOptions) -> list[Group]:
    """Puts together what can be held against the same references."""
    alike: dict[str, list[Artifact]] = {}
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
        groups += [Group(part, model, sample) for part in parts]
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
            manifest.model.exit_layer,
            manifest.merged_adapters,
            manifest.context,
            manifest.recipe,
            plan,
            manifest.rotation,
            manifest.calibration,
            manifest.tokenizer_sha256,
        )
    )
