"""Holds an artifact's integers and scales against its manifest and the weight store."""

from __future__ import annotations

from pathlib import Path

from edgeforge.errors import CheckFailed
from exporters.manifest import MANIFEST, Manifest
from exporters.registry import find_target
from quant.store.store import WeightStore


def require_recorded_weights(folder: Path, manifest: Manifest) -> None:
    """Reads integers and scales back out of the files and compares their digests with the manifest.

    Raises:
        CheckFailed: a weight is absent or differs.
    """
    found = find_target(manifest.target).stored_digests(folder)
    for name, record in manifest.weights.items():
        if name not in found:
            raise CheckFailed(f"{folder}: {name} is recorded in {MANIFEST} and absent in the files")
        if found[name] != record.digest:
            raise CheckFailed(
                f"{folder}: {name} has other integers or scales in the files than {MANIFEST} "
                f"records: one of the two was changed after the export"
            )


def unlike_store(manifest: Manifest, store: WeightStore) -> tuple[str, ...]:
    """Returns the weights whose digest in the manifest is not the store's.

    Args:
        manifest: of an artifact that passed `require_recorded_weights`.
        store: the store of the same checkpoint, recipe, rotation and calibration.
    """
    return tuple(
        name
        for name in {**manifest.weights, **store.digests}
        if name not in manifest.weights or store.digests.get(name) != manifest.weights[name].digest
    )
