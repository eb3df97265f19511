"""Finds the weight store of a checkpoint, plan and calibration in the cache, or makes it."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgeforge.cache import cache_dir, writable_cache
from edgeforge.calibration.text import (
    CalibrationRun,
)
from edgeforge.checkpoint.checkpoint import CheckpointDigest
from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.stage_progress import Progress, tell
from quant.errors import QuantizationError
from quant.plans.plan import QuantPlan
from quant.store.store import WeightStore


def quantize(
    weights: CheckpointWeights,
    digest: CheckpointDigest,
    plan: QuantPlan,
    threads: int | None,
    progress: Progress,
    run: CalibrationRun | None = None,
    *,
    unchanged: Callable[[], None] | None = None,
) -> WeightStore:
    """Returns the store of this checkpoint, plan and calibration, from the cache or made now.

    Args:
        weights: the checkpoint's weights.
        digest: the checkpoint's digest; a part of the store's key.
        plan: the format and algorithm of each weight.
        threads: number of threads; None for one per processor, at most four.
        progress: called as each stage advances.
        run: the calibration; None where the plan needs none.
        unchanged: refuses the work if what is read has changed; None for the checkpoint's own. It
            is called before results get a name under which they would be found again.

    Raises:
        CheckpointError: the checkpoint changed while it was read.
        QuantizationError: a weight cannot be quantized, the folder of partial results belongs
            to another store, or the cache cannot be read or written.
    """
    from edgeforge.calibration.few_tokens import few_tokens_note
    from quant.plans.plan import calibrated_weights
    from quant.store.cached import find_store, new_store, store_key
    from quant.store.fill import fill_store

    unchanged = unchanged or weights.checkpoint.require_unchanged
    cache = writable_cache() / "stores"
    if not calibrated_weights(plan):
        # Only static caches use this text, so it must not change the store's key.
        run = None
    text = "" if run is None else run.calibration.digest
    key = store_key(digest.sha256, weights.mapping_digest(), plan, text)

    def told(sentence: str) -> None:
        tell(progress, sentence)

    def tell_of_experts(store: WeightStore) -> None:
        for sentence in few_tokens_note(store.tokens, weights.shapes()):
            told(sentence)

    found = _shared_store(key, told) or find_store(cache, key, told)
    if found is not None:
        progress("quantize (cached)", 1, 1)
        tell_of_experts(found)
        return found
    size, done = sum(map(math.prod, weights.shapes().values())), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("quantize", done, size)

    if run is None:
        with new_store(cache, key, plan, weights.shapes(), unchanged) as writer:
            fill_store(weights, plan, writer, threads=threads, progress=advance)
        return WeightStore(cache / key)

    from edgeforge.calibration.fill import fill_calibrated
    from quant.store.partial import partial_store

    shapes = weights.shapes()
    with partial_store(cache, key, plan, shapes, run.resume, unchanged, told) as partial:
        fill_calibrated(run, plan, partial, threads, progress)
    store = WeightStore(cache / key)
    tell_of_experts(store)
    return store


def _shared_store(key: str, told: Callable[[str], None]) -> WeightStore | None:
    """Returns a store of a cache that can only be read; a damaged one is told and passed over."""
    from quant.store.cached import find_store

    if writable_cache() == cache_dir():
        return None
    try:
        return find_store(cache_dir() / "stores", key, told)
    except QuantizationError as error:
        told(f"a store of a cache that can only be read is not used: {error}")
        return None
