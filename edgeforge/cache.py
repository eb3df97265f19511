"""The folder where EdgeForge keeps what it can compute again, such as digests and weight stores."""

from __future__ import annotations

import os
from pathlib import Path


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
