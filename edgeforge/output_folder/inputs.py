"""Refuses an output that is, holds or lies in what a command reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgeforge.errors import UsageError


@dataclass(frozen=True)
class Input:
    """A file or folder that a command reads, or keeps and comes back to.

    Attributes:
        what: what it is, such as ``the checkpoint``; messages begin with it.
        path: where it is; it need not exist.
        whole: whether all that lies in this folder belongs to it, so that no output may.
    """

    what: str
    path: Path
    whole: bool = False


def refuse_inputs(out: Path, inputs: Iterable[Input], what: str = "the output folder") -> None:
    """Refuses an output that is an input, holds one, or lies in one.

    Paths are compared after their links, and by device and inode too: a bind mount, or another
    spelling on a file system without upper and lower case, is the same folder.

    Args:
        out: the file or folder to write; it need not exist.
        inputs: what must stay as it is.
        what: what ``out`` is, for messages.

    Raises:
        UsageError: names the input, and how the output lies to it.
    """
    real = Path(os.path.realpath(out.expanduser()))
    above = [_identity(path) for path in (real, *real.parents)]
    for given in inputs:
        inner = Path(os.path.realpath(given.path.expanduser()))
        around = [_identity(path) for path in (inner, *inner.parents)]
        if above[0] == around[0]:
            relation = "is"
        elif above[0] in around:
            relation = "holds"
        elif given.whole and around[0] in above:
            relation = "lies in"
        else:
            continue
        raise UsageError(
            f"{what} {out} {relation} {given.what} {given.path}, which would be lost or changed: "
            f"choose a place apart from it"
        )


def _identity(path: Path) -> tuple[int, int] | Path:
    """Device and inode, or the path itself where nothing is there yet."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino
