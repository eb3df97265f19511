"""Folders as EdgeForge writes them, without running it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Artifact = Callable[..., Path]


@pytest.fixture
def artifact() -> Artifact:
    """Writes as much of an artifact as tells that EdgeForge wrote it."""

    def write(folder: Path, *files: str, target: str = "onnx", text: str = "") -> Path:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        folder.mkdir(parents=True, exist_ok=True)
        listed = {name: {"size": len(text), "sha256": ""} for name in files}
        manifest = {"target": target, "files": listed, "schema_version": 1}
        (folder / "edgeforge.json").write_text(json.dumps(manifest))
        return folder

    return write
