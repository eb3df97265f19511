"""Weight stores in a cache folder: complete or absent, and found by their keys."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from quant.errors import QuantizationError, StoreDamagedError, StoreFullError
from quant.locked_folders import unfinished
from quant.plans.algorithms import ROUNDING_VERSION
from quant.plans.plan import QuantPlan
from quant.store.store import NOTES_FILE, STORE_VERSION, WeightStore, readable
from quant.store.writer import StoreWriter

Result = TypeVar("Result")

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def store_key(
    source_digest: str, mapping_digest: str, plan: QuantPlan, calibration: str = ""
) -> str:
    """Returns the key of the store that a checkpoint, a plan and a calibration determine.

    Args:
        source_digest: digest of the checkpoint's files.
        mapping_digest: digest of the map from program weights to checkpoint tensors.
        plan: formats and algorithms.
        calibration: digest of the calibration's tokens; empty where the plan needs none.
    """
    versions = f"{STORE_VERSION}.{ROUNDING_VERSION}"
    facts = (versions, source_digest, mapping_digest, plan.fingerprint())
    text = "\n".join((*facts, calibration) if calibration else facts)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@contextmanager
def new_store(
    cache: Path,
    key: str,
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    unchanged: Callable[[], None] = lambda: None,
) -> Iterator[StoreWriter]:
    """Opens a writer; its store moves to ``cache / key`` when the block ends without an error.

    When the block raises, nothing of the store remains.

    Args:
        cache: folder of stores.
        key: the store's key, as `store_key` returns it.
        plan: formats by weight name.
        shapes: shape by weight name.
        unchanged: raises an error if the weights' source is no longer what the key says; it is
            called before the store gets its name.

    Raises:
        StoreFullError: there is no room for the store.
        QuantizationError: the cache folder cannot be written.
    """
    with ExitStack() as stack:
        partial = or_explained(cache, lambda: stack.enter_context(unfinished(cache, key)))
        writer = or_explained(cache, lambda: StoreWriter(partial, plan, shapes))
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        or_explained(cache, writer.finish)
        unchanged()
        final = cache / key
        try:
            partial.rename(final)
        except OSError:  # another process was faster; the bytes of its store are the same
            if not (final / NOTES_FILE).is_file():
                raise


def or_explained(cache: Path, work: Callable[[], Result]) -> Result:
    """Runs some work on the cache, and turns the system's errors into messages for users.

    The error is not raised `from` the system's error: a caller that writes an output folder would
    find that one as the cause, and report the output folder's disk as full.

    Raises:
        StoreFullError: there is no room on the cache's disk.
        QuantizationError: the cache cannot be written.
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


def find_store(
    cache: Path, key: str, tell: Callable[[str], None] = lambda note: None
) -> WeightStore | None:
    """Returns the finished store of this key, or None; removes a damaged one.

    All stored parts are read and held against their checksums. Only a store that is not as it was
    written is removed, never one that the system does not let be read now.

    Args:
        cache: folder of stores.
        key: the store's key, as `store_key` returns it.
        tell: called with a sentence for the user when a damaged store was removed.

    Raises:
        StoreUnreadableError: the system does not let the store be read.
        QuantizationError: a damaged store cannot be removed.
    """
    folder = cache / key
    if not readable(folder, folder.exists):
        return None
    try:
        store = WeightStore(folder)
        store.check()
        return store
    except StoreDamagedError as damage:
        if not _remove_damaged(folder, damage):
            return None  # another process has already removed it
        tell(f"a damaged weight store was removed and is made again: {damage}")
        return None


def _remove_damaged(folder: Path, damage: StoreDamagedError) -> bool:
    """Removes a damaged store; returns whether it was still there."""
    away = folder.parent / f".{folder.name}.partial-damaged-{os.getpid()}-{threading.get_ident()}"
    try:
        folder.rename(away)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise QuantizationError(
            f"{damage}, and it cannot be removed ({error.strerror}): remove it yourself"
        ) from error
    shutil.rmtree(away, ignore_errors=True)
    return True
