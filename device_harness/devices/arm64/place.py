"""Where the emulator's root folder and its downloads are kept."""

from __future__ import annotations

import os
from pathlib import Path


def arm64_folder() -> Path:
    """Returns the emulator's folder, which may not exist yet.

    ``$EDGEFORGE_ARM64`` if set, else ``arm64`` in EdgeForge's cache, which is in the same places as
    for `edgeforge.cache.cache_dir`: ``$EDGEFORGE_CACHE`` if set, else
    ``$XDG_CACHE_HOME/edgeforge``, else ``~/.cache/edgeforge``.
    """
    if chosen := os.environ.get("EDGEFORGE_ARM64"):
        return Path(chosen).expanduser().absolute()
    if chosen := os.environ.get("EDGEFORGE_CACHE"):
        return Path(chosen).expanduser().absolute() / "arm64"
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "edgeforge" / "arm64"
