"""The folder where EdgeForge keeps what it can compute again, such as digests and weight stores."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.input_files import read_input
from quant.sealed_json import seal, unseal

_LARGEST_RECORD = 1 << 28


def cache_dir() -> Path:
    """Return the cache folder, which may not exist yet.

    ``$EDGEFORGE_CACHE`` if set, else ``$XDG_CACHE_HOME/edgeforge``, else ``~/.cache/edgeforge``.
    """
    if chosen := os.environ.get("EDGEFORGE_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG base directory specification tells programs to ignore a relative path here.
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "edgeforge"


def read_record(file: Path) -> dict[str, Any] | None:
    """Returns what `write_record` wrote, None where the file is missing, damaged or unreadable.

    What is None is computed again, and nothing is removed.
    """
    try:
        return unseal(read_input(file, _LARGEST_RECORD))
    except (OSError, ValueError):
        return None


def write_record(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON values, whole or not at all, with a digest by which damage is known.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}-{threading.get_ident()}")
    try:
        partial.write_text(seal(content), encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
