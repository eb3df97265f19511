"""The store of a checkpoint, plan and calibration: found in the cache, or made."""

from __future__ import annotations

import math

from edgeforge.cache import cache_dir
from edgeforge.calibration.text import (
    CalibrationRun,
)
from edgeforge.checkpoint.checkpoint import CheckpointDigest
from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.stage_progress import Progress
from quant.plans.plan import QuantPlan
from quant.store.store import WeightStore


def quantize(
    weights: CheckpointWeights,
    digest: CheckpointDigest,
    plan: QuantPlan,
    threads: int | None,
    progress: Progress,
    run: CalibrationRun | None = None,
) -> WeightStore:
    """The store of this checkpoint, plan and calibration: found in the cache, or made now.

    Args:
        weights: of the checkpoint.
        digest: of the checkpoint.
        plan: what to make of each weight.
        threads: how many to use; None for one per processor, four at most.
        progress: told of each stage.
        run: how to calibrate; None where the plan needs no calibration.
    """
    from quant.plans.plan import calibrated_weights
    from quant.store.fill import fill_store
    from quant.store.store import find_store, new_store, store_key

    cache = cache_dir() / "stores"
    if not calibrated_weights(plan):
        run = None  # Only the caches need this text; it must not change the store's key.
    text = "" if run is None else run.calibration.digest
    key = store_key(digest.sha256, weights.mapping_digest(), plan, text)
    found = find_store(cache, key)
    if found is not None:
        progress("quantize (cached)", 1, 1)
        return found
    size, done = sum(map(math.prod, weights.shapes().values())), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("quantize", done, size)

    if run is None:
        with new_store(cache, key, plan, weights.shapes()) as writer:
            fill_store(weights, plan, writer, threads=threads, progress=advance)
        return WeightStore(cache / key)

    from edgeforge.calibration.fill import fill_calibrated
    from quant.store.partial import partial_store

    with partial_store(cache, key, plan, weights.shapes(), run.resume) as partial:
        fill_calibrated(run, plan, partial, threads, progress)
    return WeightStore(cache / key)
