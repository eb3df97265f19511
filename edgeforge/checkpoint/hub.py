"""Downloads checkpoints by hub id into huggingface_hub's own cache, or finds them there offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgeforge.checkpoint.adapters import ADAPTER_CONFIG, refuse_adapter
from edgeforge.checkpoint.layout import (
    CONFIG,
    GENERATION_CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TOKENIZER_FILES,
    TORCH,
    TORCH_INDEX,
    VOCABULARY_FILES,
    find_weights,
)
from edgeforge.checkpoint.other_formats import name_other_format
from edgeforge.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SAFETENSORS_PATTERNS = (SAFETENSORS, SAFETENSORS_INDEX, "model-*.safetensors")
_TORCH_PATTERNS = (TORCH, TORCH_INDEX, "pytorch_model-*.bin")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(source: str) -> bool:
    """Tell whether a text has the form ``organisation/name``.

    >>> is_hub_id("apple/OpenELM-270M"), is_hub_id("./model"), is_hub_id("model")
    (True, False, False)
    """
    return _HUB_ID.fullmatch(source) is not None


def download_checkpoint(hub_id: str, revision: str | None) -> Path:
    """Return the snapshot folder of a hub checkpoint; download files that are not in the cache.

    Pickled weights are downloaded only when the repository has no safetensors. With
    ``HF_HUB_OFFLINE=1``, or when the hub does not answer, only the cache is used.

    Raises:
        CheckpointError: The repository or revision does not exist or is gated, or the hub cannot
            be reached and the cache lacks files; the message names them.
    """
    # An adapter's configuration is enough to refuse it by name.
    base = (CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, *TOKENIZER_FILES)
    patterns: tuple[str, ...] = (*base, *_SAFETENSORS_PATTERNS)
    folder = _snapshot(hub_id, revision, patterns)
    refuse_adapter(folder, hub_id, has_weights=find_weights(folder) is not None)
    if find_weights(folder) is None:
        patterns = (*base, *_TORCH_PATTERNS)
        folder = _snapshot(hub_id, revision, patterns)
    missing = _missing_weights(folder)
    if missing and find_weights(folder) is not None:
        # The shards that an index names need not match the usual patterns.
        folder = _snapshot(hub_id, revision, (*patterns, *missing))
        missing = _missing_weights(folder)
    if not (folder / CONFIG).is_file():
        missing = [CONFIG, *missing]
    if missing:
        other = None if _is_offline() else _name_other_format(hub_id, revision)
        if other is not None:
            raise CheckpointError(
                f"{_title(hub_id, revision)} is no such checkpoint: it has {other}"
            )
        raise _incomplete(hub_id, revision, folder, ", ".join(missing))
    return folder


def download_config(hub_id: str, revision: str | None) -> Path:
    """Return the snapshot folder of a hub repository with its configuration in it, and no weights.

    Raises:
        CheckpointError: As ``download_checkpoint``.
    """
    folder = _snapshot(hub_id, revision, (CONFIG, GENERATION_CONFIG))
    if not (folder / CONFIG).is_file():
        raise _incomplete(hub_id, revision, folder, CONFIG)
    return folder


def download_tokenizer(hub_id: str, revision: str | None) -> Path:
    """Return the snapshot folder of a hub repository with its tokenizer files in it.

    Raises:
        CheckpointError: As ``download_checkpoint``.
    """
    folder = _snapshot(hub_id, revision, TOKENIZER_FILES)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise _incomplete(hub_id, revision, folder, " or ".join(VOCABULARY_FILES))
    return folder


def commit_of(snapshot: Path) -> str | None:
    """Return the commit that a snapshot folder is named after, or None for another name."""
    return snapshot.name if _COMMIT.fullmatch(snapshot.name) else None


def _missing_weights(folder: Path) -> list[str]:
    layout = find_weights(folder)
    if layout is None:
        # The cache makes the link before the file is complete, so a dangling link names a file
        # whose download was interrupted.
        awaited = [n for n in (SAFETENSORS, SAFETENSORS_INDEX, TORCH) if (folder / n).is_symlink()]
        return awaited or [f"{SAFETENSORS} (or {SAFETENSORS_INDEX} with its shards, or {TORCH})"]
    return [name for name in layout.files if not (folder / name).is_file()]


def _name_other_format(hub_id: str, revision: str | None) -> str | None:
    """Returns what a repository has in place of the weights that are missing; None if unknown."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        names = huggingface_hub.list_repo_files(hub_id, revision=revision)
    except (errors.HfHubHTTPError, OSError, ValueError):
        return None  # what is missing is told all the same
    readable = {SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX} & set(names)
    return None if readable else name_other_format(names)


def _title(hub_id: str, revision: str | None) -> str:
    return f"{hub_id} at revision {revision or 'main'}"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cure(hub_id: str, revision: str | None) -> str:
    chosen = f" --revision {revision}" if revision else ""
    first = "unset HF_HUB_OFFLINE" if _is_offline() else "check the connection"
    return (
        f"{first} and try again, or run 'hf download {hub_id}{chosen}' where there is a network "
        "and pass the folder"
    )


def _incomplete(hub_id: str, revision: str | None, folder: Path, missing: str) -> CheckpointError:
    return CheckpointError(
        f"the snapshot of {_title(hub_id, revision)} in {folder} lacks {missing}: if the "
        f"repository has it, {_cure(hub_id, revision)}"
    )


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # Older versions have no such error: they return the folder as it is, which `_missing_weights`
    # looks through.
    incomplete = getattr(errors, "IncompleteSnapshotError", ())
    title = _title(hub_id, revision)
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=list(patterns)
        )
    except incomplete as error:
        names = re.search(r"missing \((.*?)\)\.", str(error))
        raise _incomplete(
            hub_id, revision, Path(error.snapshot_path), names[1] if names else "some files"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        state = "HF_HUB_OFFLINE is set" if _is_offline() else "the hub cannot be reached"
        raise CheckpointError(
            f"{title} is not in the cache {huggingface_hub.constants.HF_HUB_CACHE} and {state}: "
            f"none of its files is here; {_cure(hub_id, revision)}"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} is gated: accept its terms on its page, then log in with 'hf auth login'"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} has no revision {revision or 'main'}: name a branch, a tag or a commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor a repository on the hub that you may read: "
            "check the name, or log in with 'hf auth login' if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{hub_id!r} is neither a folder here nor a hub id") from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{title} could not be downloaded ({type(error).__name__}: {words}): "
            f"{_cure(hub_id, revision)}"
        ) from error
    return Path(folder)
