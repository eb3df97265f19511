"""Weight stores in a cache folder: made whole or not at all, and found again by their key."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from quant.errors import QuantizationError, StoreFullError
from quant.plans.plan import QuantPlan
from quant.store.store import NOTES_FILE, STORE_VERSION, WeightStore
from quant.store.writer import StoreWriter

Result = TypeVar("Result")

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE_SECONDS = 24 * 3600  # no store takes a day: its writer was killed


def store_key(
    source_digest: str, mapping_digest: str, plan: QuantPlan, calibration: str = ""
) -> str:
    """The name of the store that a checkpoint, a plan and a calibration give.

    Args:
        source_digest: digest of the checkpoint's files.
        mapping_digest: digest of the map from program weights to checkpoint tensors.
        plan: formats and algorithms.
        calibration: digest of the tokens that it calibrates on, empty where it needs none.
    """
    facts = (str(STORE_VERSION), source_digest, mapping_digest, plan.fingerprint())
    text = "\n".join((*facts, calibration) if calibration else facts)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@contextmanager
def new_store(
    cache: Path, key: str, plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[StoreWriter]:
    """A writer whose store appears under ``cache / key`` only when the block ends well.

    Args:
        cache: folder of stores.
        key: `store_key`.
        plan: formats by weight.
        shapes: shape by weight.

    Raises:
        StoreFullError: there is no room for the store.
        QuantizationError: the cache folder cannot be written.
    """
    partial = cache / f".{key}.partial-{os.getpid()}-{threading.get_ident()}"
    try:
        writer = or_explained(cache, lambda: _open_writer(partial, plan, shapes))
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        or_explained(cache, writer.finish)
        final = cache / key
        try:
            partial.rename(final)
        except OSError:  # another process was first; its bytes are the same
            if not (final / NOTES_FILE).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_writer(
    partial: Path, plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]
) -> StoreWriter:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for other in partial.parent.glob(".*.partial-*"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    partial.mkdir()
    return StoreWriter(partial, plan, shapes)


def or_explained(cache: Path, work: Callable[[], Result]) -> Result:
    """What some work on the cache gives; what the disk refuses becomes a sentence.

    The sentence is not raised `from` the system's error: whoever is writing an output folder
    around this would look through to it, and take that folder's disk for the full one.
    """
    try:
        return work()
    except OSError as error:
        number, words = error.errno, error.strerror
    if number in _OUT_OF_SPACE:
        raise StoreFullError(
            f"the cache of weight stores {cache} has no room for this model ({words}): free some "
            f"space, or set EDGEFORGE_CACHE to a folder on another disk"
        )
    raise QuantizationError(
        f"the cache of weight stores {cache} cannot be written ({words}): set EDGEFORGE_CACHE to "
        f"another folder"
    )


def find_store(cache: Path, key: str) -> WeightStore | None:
    """The finished store of this key, or None; a damaged one is removed.

    Damage is what a file's size shows: a disk that filled up or a copy that broke off.

    Raises:
        QuantizationError: a damaged store cannot be removed.
    """
    folder = cache / key
    if not folder.exists():
        return None
    try:
        return WeightStore(folder)
    except QuantizationError as damage:
        away = cache / f".{key}.partial-damaged-{os.getpid()}-{threading.get_ident()}"
        try:
            folder.rename(away)
        except FileNotFoundError:  # another process was first
            return None
        except OSError as error:
            raise QuantizationError(
                f"{damage}, and it cannot be removed ({error.strerror}): remove it yourself"
            ) from error
        shutil.rmtree(away, ignore_errors=True)
        return None
