"""Finds what a user names: the folder of a checkpoint, its weights, and a tokenizer."""

from __future__ import annotations

from pathlib import Path

from edgeforge.checkpoint.adapters import refuse_adapter
from edgeforge.checkpoint.json_text import reason
from edgeforge.checkpoint.layout import (
    CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TORCH,
    TORCH_INDEX,
    VOCABULARY_FILES,
    WeightLayout,
    find_tokenizer_files,
    find_weights,
    is_there,
)
from edgeforge.checkpoint.links import refuse_dangling
from edgeforge.checkpoint.other_formats import name_other_format
from edgeforge.errors import CheckpointError, UsageError

# Folders that are themselves a model in another format.
_PACKAGES = (".mlpackage", ".mlmodelc")


def find_folder(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Return a checkpoint's folder, downloaded if need be, and its commit; None for a folder here.

    Args:
        source: An existing folder, or a hub id ``organisation/name``.
        revision: A hub branch, tag or commit; refused for a folder.

    Raises:
        CheckpointError: There is no such folder and no such hub id.
        UsageError: ``revision`` is given with a folder.
    """
    folder = Path(source).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source[:200]!r} is not a usable path: {error}") from error
    if is_folder and source:  # Path("") is the current folder, which nobody asked for.
        if revision is not None:
            raise UsageError(
                f"{source} is a folder, which has no revision: leave out --revision {revision}"
            )
        return folder, None
    refuse_dangling(folder)
    if exists and source:
        other = name_other_format([folder.name])
        if other is not None and folder.suffix not in (".safetensors", ".bin", ".pt"):
            raise CheckpointError(f"{source} is not the folder of a checkpoint: it is {other}")
        raise CheckpointError(
            f"{source} is a file; name the folder that holds it together with {CONFIG}"
        )
    from edgeforge.checkpoint import hub

    if not hub.is_hub_id(source):
        raise CheckpointError(
            f"{source!r} is neither a folder here nor a hub id of the form organisation/name"
        )
    snapshot = hub.download_checkpoint(source, revision)
    return snapshot, hub.commit_of(snapshot)


def require_weights(folder: Path, source: str) -> WeightLayout:
    """Return the weight files of a folder, all of which are there.

    Args:
        folder: The checkpoint's folder.
        source: What the user gave, for messages.

    Raises:
        CheckpointError: There are none, or weights of another kind; the message names them.
    """
    try:
        for name in (SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX):
            refuse_dangling(folder / name)
            if is_there(folder / name):
                break
        layout = find_weights(folder)
        refuse_adapter(folder, source, layout is not None)
        if layout is not None:
            for name in layout.files:
                refuse_dangling(folder / name)
                if not is_there(folder / name):
                    raise CheckpointError(
                        f"{folder / name} is missing, though the index lists it: download it again"
                    )
            return layout
        has_config = (folder / CONFIG).exists()
        held = [path.name for path in folder.iterdir() if path.is_file() or path.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {reason(error)}") from error
    other = name_other_format([folder.name, *held] if folder.suffix in _PACKAGES else held)
    found = "" if other is None else f"; it has {other}"
    if not has_config:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {CONFIG}{found}")
    raise CheckpointError(
        f"{folder} has no weights: {SAFETENSORS}, {SAFETENSORS_INDEX} or {TORCH} is needed{found}"
    )


def find_tokenizer(source: str) -> tuple[Path, dict[str, Path]]:
    """Return the folder of a tokenizer that the user named, and its files by name.

    Args:
        source: A folder, one of `VOCABULARY_FILES`, or a hub id.

    Raises:
        CheckpointError: There is no tokenizer.
    """
    path = Path(source).expanduser()
    refuse_dangling(path)
    if path.is_file():
        if path.name not in VOCABULARY_FILES:
            raise CheckpointError(
                f"{path} is not a tokenizer file; name a folder, or one of "
                f"{', '.join(VOCABULARY_FILES)}"
            )
        return path.parent, {**find_tokenizer_files(path.parent), path.name: path}
    if not path.is_dir():
        from edgeforge.checkpoint import hub

        if not hub.is_hub_id(source):
            raise CheckpointError(
                f"the tokenizer {source!r} is neither a folder nor a file here nor a hub id of the "
                "form organisation/name"
            )
        path = hub.download_tokenizer(source, None)
    files = find_tokenizer_files(path)
    if not any(name in files for name in VOCABULARY_FILES):
        raise CheckpointError(f"{path} has no tokenizer: {' or '.join(VOCABULARY_FILES)} is needed")
    return path, files
