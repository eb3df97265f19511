"""Parses a checkpoint's JSON within size limits, and refuses damaged text in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

from edgeforge.checkpoint.links import refuse_dangling
from edgeforge.errors import CheckpointError
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json

MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20

_LFS_PREFIX = b"version https://git-lfs.github.com/spec/"


def reason(error: OSError) -> str:
    """Return the operating system's text for an error, such as 'Permission denied'."""
    return error.strerror or str(error)


def refuse_git_lfs_pointer(path: Path, start: bytes) -> None:
    """Refuse a file whose first bytes are those of a Git LFS pointer, not of the content.

    Raises:
        CheckpointError: ``start`` is the start of a pointer.
    """
    if start.startswith(_LFS_PREFIX):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder "
            "or download the file again"
        )


def read_small_file(path: Path, limit: int) -> bytes:
    """Return a file's bytes.

    Raises:
        CheckpointError: The file is missing, a link to nothing, not a regular file, unreadable,
            larger than ``limit`` bytes, or a Git LFS pointer.
    """
    try:
        refuse_dangling(path)
        if not path.is_file():
            what = "is not a file" if path.exists() else "is missing"
            raise CheckpointError(f"{path} {what}: the checkpoint is incomplete")
        size = os.path.getsize(path)
        if size > limit:
            raise CheckpointError(
                f"{path} has {size} bytes; EdgeForge reads at most {limit} bytes of such a file"
            )
        content = read_input(path, limit)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    refuse_git_lfs_pointer(path, content)
    return content


def parse_object(content: bytes, what: str, *, strict: bool) -> dict[str, object]:
    """Parse a JSON object.

    Args:
        content: UTF-8 text.
        what: The text's name in messages, such as "/m/config.json" or "the header of
            /m/model.safetensors".
        strict: Whether to refuse every duplicate key and NaN or Infinity. Released configs contain
            them, so configs are not read strictly: there, only a key with two different values is
            refused.

    Raises:
        CheckpointError: The text is not JSON, not an object, nested too deep, or has too many
            values.
    """
    try:
        value = parse_json(content, strict=strict)
    except JsonError as error:
        raise CheckpointError(f"{what} {error}") from None
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else f"a {type(value).__name__}"
        raise CheckpointError(f"{what} is not a JSON object but {kind}")
    return value
