"""Finds artifacts in the folders that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporters.manifest import MANIFEST


def find_artifacts(folders: Sequence[Path]) -> list[Path]:
    """Artifacts in folders: each itself, or those right inside it, as one per target."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        found.extend(inside if inside and not (folder / MANIFEST).is_file() else [folder])
    return found
