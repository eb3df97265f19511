"""JSON as checkpoints carry it: sized, parsed, and refused in one sentence when it is not sound."""

from __future__ import annotations

import json
import os
from pathlib import Path

from edgeforge.errors import CheckpointError

MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
# Every JSON value costs one of these marks, so counting them bounds what a parser can allocate.
MAX_MARKS = 2_000_000

_LFS_PREFIX = b"version https://git-lfs.github.com/spec/"


def reason(error: OSError) -> str:
    """Return the operating system's words for an error: 'Permission denied'."""
    return error.strerror or str(error)


def refuse_git_lfs_pointer(path: Path, start: bytes) -> None:
    """Raise when a file's first bytes show a Git LFS pointer instead of the content.

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
        CheckpointError: Missing, not a regular file, unreadable, above ``limit`` bytes, or a Git
            LFS pointer.
    """
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "is missing"
            raise CheckpointError(f"{path} {what}: the checkpoint is incomplete")
        size = os.path.getsize(path)
        if size > limit:
            raise CheckpointError(
                f"{path} has {size} bytes; at most {limit} are read of such a file"
            )
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    refuse_git_lfs_pointer(path, content)
    return content


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
        key.encode()  # A lone surrogate is no Unicode text: UnicodeEncodeError is a ValueError.
        found[key] = value
    return found


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def parse_object(content: bytes, what: str, *, strict: bool) -> dict[str, object]:
    """Parse a JSON object.

    Args:
        content: UTF-8 text.
        what: How an error names the text: "/m/config.json", "the header of /m/model.safetensors".
        strict: Refuse duplicate keys and NaN or Infinity, which configs in the wild do contain.

    Raises:
        CheckpointError: Not JSON, not an object, nested too deep, or with too many values.
    """
    if sum(content.count(mark) for mark in (b"{", b"[", b",")) > MAX_MARKS:
        raise CheckpointError(f"{what} claims more than a million values: it is damaged or hostile")
    try:
        text = content.decode("utf-8")
        if strict:
            value = json.loads(
                text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
            )
        else:
            value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deep to be sound") from None
    except ValueError as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}): it is damaged") from None
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else f"a {type(value).__name__}"
        raise CheckpointError(f"{what} is not a JSON object but {kind}")
    return value
