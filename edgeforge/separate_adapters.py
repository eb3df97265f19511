"""Adapters that lie beside an artifact's weights: written with it, or added to one that is out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeforge.artifact_manifest import adapter_record
from edgeforge.cards.write import write_cards
from edgeforge.checkpoint.adapter import open_adapters
from edgeforge.errors import CheckFailed, UsageError
from edgeforge.model.low_rank import (
    SeparateAdapter,
    adaptable,
    check_adapters,
    refuse_rounded,
)
from edgeforge.model.model import Model
from edgeforge.output_folder.atomic import atomic_folder, check_output
from edgeforge.output_folder.inputs import Input
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.verification.references import reopen
from exporters.adapters import write_adapter
from exporters.manifest import MANIFEST, Manifest, check_files, record_files
from exporters.manifest_records import AdapterRecord
from exporters.registry import find_target
from exporters.structure import to_json


def write_adapters(
    model: Model, adapters: Sequence[SeparateAdapter], target: str, folder: Path
) -> tuple[AdapterRecord, ...]:
    """Writes adapters beside an artifact's weights; its manifest does not list them yet.

    Returns:
        Their records.

    Raises:
        ExportError: a product takes no adapter.
    """
    weights = adaptable(model)
    return tuple(
        adapter_record(
            each.adapter, write_adapter(target, folder, each.adapter.name, each.pairs, weights)
        )
        for each in adapters
    )


def export_adapter(
    artifact: Path,
    adapter: str,
    *,
    checkpoint: str | None = None,
    progress: Progress = no_progress,
) -> AdapterRecord:
    """Adds an adapter to an artifact, which takes it while it runs; its weights stay as they are.

    A copy of the artifact takes its place once it is whole. Files of the copy that the adapter does
    not change are the same files on the disk.

    Args:
        artifact: the artifact.
        adapter: the adapter's folder, or ``DIR@weight``.
        checkpoint: where the base's checkpoint is now; None for where the manifest says.
        progress: told of each stage.

    Raises:
        CheckFailed: a file of the artifact was changed.
        CheckpointError: the checkpoint or the adapter cannot be read, or they do not fit.
        ExportError: the artifact's target takes no adapters.
        UsageError: the artifact has an adapter of that name, its weights are rotated, its recipe
            rounds activations, or it holds files of others.
    """
    manifest = Manifest.read(artifact)
    (opened,) = open_adapters([adapter])
    if any(record.name == opened.name for record in manifest.adapters):
        raise UsageError(
            f"{artifact} has an adapter named {opened.name} already: rename the folder"
        )
    if manifest.rotation is not None:
        raise UsageError(
            f"the weights of {artifact} are rotated ({manifest.rotation.name}), and an adapter "
            f"fits them as they were: export the base again without a rotation"
        )
    progress("files", 0, 0)
    problems = check_files(artifact, manifest)
    if problems:
        raise CheckFailed(f"{artifact}: {'; '.join(problems)}")
    model = reopen(manifest, checkpoint)
    target = find_target(manifest.target)
    ready = check_adapters(model, [opened], [target.name], manifest.options)
    rounded = {name: record.activation for name, record in manifest.weights.items()}
    refuse_rounded(ready[0].pairs, manifest.recipe, rounded)
    inputs = [Input("the adapter", opened.place, whole=True)]
    check_output(artifact, True, inputs)
    progress("write adapter", 0, 0)
    with atomic_folder(artifact, True, inputs=inputs) as partial:
        _link(artifact, partial)
        (record,) = write_adapters(model, ready, target.name, partial)
        opened.tensors.require_unchanged()
        found = record_files(partial)
        changed = replace(
            manifest,
            adapters=(*manifest.adapters, record),
            files={name: found[name] for name in found if name in (*manifest.files, record.file)},
            structure=to_json(target.structure(partial)),
        )
        (partial / MANIFEST).unlink()
        changed.write(partial)
        write_cards(partial, changed, model.checkpoint, None)
    return record


def _link(source: Path, folder: Path) -> None:
    """Makes a folder of the same files: links where the file system has them, else copies."""
    for path in sorted(source.rglob("*")):
        place = folder / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
            continue
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)
