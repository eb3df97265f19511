"""Holds an artifact's integers and scales against its manifest and the weight store."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.errors import CheckFailed
from exporters.manifest import MANIFEST, Manifest
from exporters.registry import find_target
from quant.plans.algorithms import is_calibrated
from quant.processors import processor_kind

if TYPE_CHECKING:
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


def may_differ(manifest: Manifest, unlike: Collection[str]) -> bool:
    """Returns whether another kind of processor explains weights that are not the store's.

    Statistics of activations and rotated weights are sums of floats, which processors round
    differently, so that a few integers come out otherwise. Other integers do not depend on it.

    Args:
        manifest: the artifact's.
        unlike: the weights that are not the store's.
    """
    sums = manifest.rotation is not None or all(
        name in manifest.weights and is_calibrated(manifest.weights[name].algorithm)
        for name in unlike
    )
    return bool(unlike) and sums and manifest.processor != processor_kind()
