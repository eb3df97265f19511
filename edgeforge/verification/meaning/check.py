"""`check_meaning`: does an artifact compute what its checkpoint says?

Nothing is run. Every entry point is read from the files and compared with the checkpoint's spec and
the plan, fact by fact. So a fault is found where it is, also in an entry point or at a position
that no text reaches, and whether or not any figure shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from device_harness.errors import DeviceError
from edgeforge.errors import CheckFailed
from edgeforge.families.facts import longest_context
from edgeforge.families.spec import ModelSpec
from edgeforge.model.model import Model
from edgeforge.verification.bounds import Checked
from edgeforge.verification.meaning.chains import NoDecoderError
from edgeforge.verification.meaning.decoder import Decoder, decoder_of
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.identity import hold_identity
from edgeforge.verification.meaning.layers import Layers
from edgeforge.verification.meaning.registry import READERS
from edgeforge.verification.meaning.rotary import Rotary
from edgeforge.verification.meaning.stored import Stored
from exporters.damaged_files import one_sentence
from exporters.lifted import EntryPoint, Reading
from exporters.manifest import MANIFEST, Manifest

# The name of every target's entry point for drafts, without an ending.
_DRAFT: Final = "draft"


def check_meaning(folder: Path, manifest: Manifest, model: Model) -> list[Checked]:
    """Reads an artifact's files and holds what they compute against the checkpoint.

    Args:
        folder: the artifact.
        manifest: its manifest, which records the plan and the declared context.
        model: the checkpoint's own model, without a rotation.

    Returns:
        One result for each fact, and one more for what could not be read.

    Raises:
        ExportError: a file is missing or damaged.
    """
    findings, spec = Findings(), _program_spec(model.spec, manifest)
    if manifest.context > (longest := longest_context(spec)):
        findings.fact("context", "")
        words = f"the artifact is made for {manifest.context} tokens, more than the checkpoint's"
        findings.same("context", False, MANIFEST, f"{words} {longest}")
        return findings.checks()
    reader = READERS.get(manifest.target)
    if reader is None:
        findings.unread(f"the graphs of the target {manifest.target}")
        reading = Reading(())
    else:
        reading = reader(folder, manifest)
    for what in reading.unread:
        findings.unread(what)
    rotary = Rotary(spec.ropes, manifest.context)
    findings.fact("structure", "every entry point is the checkpoint's decoder")
    layers = Layers(spec, manifest.context, reading.cache_multiple, rotary, findings)
    stored = Stored(manifest, model, reading, findings)
    # What strangers write may have shapes that nothing here foresees.
    with one_sentence(folder / manifest.entry, "what EdgeForge writes"):
        for entry in reading.entry_points:
            try:
                decoder = decoder_of(entry.logits)
            except NoDecoderError as error:
                findings.same(error.fact, False, entry.name, f"{entry.name}: {error}")
                stored.operators(entry)
                continue
            findings.same("structure", True, entry.name, "")
            layers.hold(entry, decoder)
            stored.hold(entry, decoder)
            _hold_draft(findings, manifest, entry, decoder)
    if manifest.draft_positions > 1 and not any(map(_is_draft, reading.entry_points)):
        findings.fact("draft", "")
        findings.same("draft", False, manifest.entry, "there is no graph for drafts")
    hold_identity(folder, manifest, model, reading, findings)
    return findings.checks()


def _hold_draft(
    findings: Findings, manifest: Manifest, entry: EntryPoint, decoder: Decoder
) -> None:
    """Holds how many rows of logits the entry point for drafts gives against the manifest."""
    positions = manifest.draft_positions
    if positions == 1 or not _is_draft(entry):
        return
    findings.fact("draft", f"drafts get the logits of {positions} positions", positions)
    most = max(probe.count for probe in entry.probes)
    found = min(decoder.last or most, most)
    words = f"{entry.name} gives the logits of {found} positions, not of {positions}"
    if not findings.same("draft", found == positions, entry.name, words):
        findings.number("draft", found)


def _is_draft(entry: EntryPoint) -> bool:
    return Path(entry.name).stem.partition("_")[0] == _DRAFT  # with an adapter, its name follows


@contextmanager
def told_before(meant: Mapping[Path, Sequence[Checked]]) -> Iterator[None]:
    """While artifacts run: where one cannot, facts that are otherwise are told with the error.

    Args:
        meant: what `check_meaning` found, by the artifact's folder.

    Raises:
        CheckFailed: an artifact cannot be run, and a fact of one of them is otherwise.
    """
    try:
        yield
    except DeviceError as error:
        otherwise = [
            f"{folder}: {check.message}"
            for folder, checks in meant.items()
            for check in checks
            if check.verdict == "failed"
        ]
        if not otherwise:
            raise
        raise CheckFailed(f"{'; '.join(otherwise)}; and it cannot be run: {error}") from error


def _program_spec(spec: ModelSpec, manifest: Manifest) -> ModelSpec:
    """The spec of the program that was exported, which a rotation may have changed."""
    if manifest.rotation is None:
        return spec
    from edgeforge.model.rotated_weights import rotated_spec
    from edgeforge.model.rotations import find_rotation

    return rotated_spec(spec, find_rotation(manifest.rotation.name))
