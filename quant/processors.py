"""How many threads work takes when no one says."""

from __future__ import annotations

import os


def default_threads() -> int:
    """One thread per processor, four at most."""
    return min(4, os.cpu_count() or 1)
