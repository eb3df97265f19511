"""Finds artifacts in the folders that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporters.manifest import MANIFEST, MODULE_MANIFEST


def find_artifacts(folders: Sequence[Path]) -> list[Path]:
    """Artifacts in folders: each itself, or those right inside it, as one per target."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted(path.parent for name in _MANIFESTS for path in folder.glob(f"*/{name}"))
        itself = any((folder / name).is_file() for name in _MANIFESTS)
        found.extend(inside if inside and not itself else [folder])
    return found


_MANIFESTS = MANIFEST, MODULE_MANIFEST
