"""What killed exports left beside an output folder: put back, or swept away.

A folder that a live process holds is left alone, and so is one with a file that EdgeForge would not
have written there.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from edgeforge.output_folder.contents import (
    remove_known,
    strange_file,
    strange_left_over,
)
from quant.locked_folders import left_over


def repair_and_sweep(final: Path) -> None:
    """Puts an output folder back that a kill between two renames took away; removes left-overs.

    Args:
        final: the output folder's path, with links resolved.
    """
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(partial|old)-\d+(-\d+)?")
    try:
        beside = [path for path in final.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return
    moved = [path for path in beside if path.name.startswith(f".{final.name}.old-")]
    for path in sorted(moved, key=_modified, reverse=True):
        with left_over(path) as free:
            if free and not os.path.lexists(final) and _is_whole(path):
                with suppress(OSError):
                    os.rename(path, final)
    for path in beside:
        with left_over(path) as free:
            # An old folder in a new one's place is whole; a new one may stop anywhere.
            if free and not remove_known(path, strange_file):
                remove_known(path, strange_left_over)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds what EdgeForge wrote, and nothing else."""
    try:
        return any(folder.iterdir()) and strange_file(folder) is None
    except OSError:
        return False
