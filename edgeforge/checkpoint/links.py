"""Links in a checkpoint's folder: those that lead nowhere, and those that lead out of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from edgeforge.errors import CheckpointError


def refuse_dangling(path: Path) -> None:
    """Refuses a link whose target is not there.

    Raises:
        CheckpointError: names the link and its target.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path} is a link to {os.readlink(path)}, which is not there: copy the checkpoint "
            f"with 'cp -L' from where it is whole, or download it again"
        )


def leads_out(path: Path, folder: Path) -> Path | None:
    """Returns where a file really lies if that is outside its checkpoint, else None.

    The hub's cache keeps a repository's files in a folder ``blobs``, to which the files of its
    snapshots are links: these do not lead out.

    Args:
        path: a file in the folder.
        folder: the checkpoint's folder.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    repository = repository_of(root)
    if real.is_relative_to(root):
        return None
    if repository is not None and real.is_relative_to(repository / "blobs"):
        return None
    return real


def left_out(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Returns one sentence for each file of a checkpoint that leads out of it.

    Args:
        folder: the checkpoint's folder.
        names: the files that an artifact would get copies of.
    """
    found = {name: leads_out(folder / name, folder) for name in names}
    return tuple(
        f"{folder / name} is a link to {real}, outside the checkpoint, so it is not copied: put "
        f"the file itself there if you trust it"
        for name, real in found.items()
        if real is not None
    )


def repository_of(snapshot: Path) -> Path | None:
    """Returns the folder of the hub's cache that holds a snapshot and its blobs, or None."""
    above = Path(os.path.realpath(snapshot)).parents
    if len(above) > 1 and above[0].name == "snapshots" and (above[1] / "blobs").is_dir():
        return above[1]
    return None
