"""Writes a file anew where other names of it, as an older artifact's, must keep the old bytes."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Gives a path other bytes; what else refers to its old file keeps that."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(data)
    os.replace(beside, path)
