"""The default number of threads."""

from __future__ import annotations

import os


def default_threads() -> int:
    """Returns one thread per processor, four at most."""
    return min(4, os.cpu_count() or 1)
