"""A warning of several commands: the cache can only be read."""

from __future__ import annotations

import sys


def print_cache_warning() -> None:
    """Prints, on stderr, that results are kept elsewhere, where the cache can only be read."""
    from edgeforge.cache import cache_note
    from edgeforge.cli.exits import one_line

    note = cache_note()
    if note is not None:
        print(one_line(f"warning: {note}"), file=sys.stderr)
