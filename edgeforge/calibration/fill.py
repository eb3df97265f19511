"""Fills a weight store in which some weights are quantized on activations."""

from __future__ import annotations

import math

from edgeforge.calibration.filling import Filling
from edgeforge.calibration.rescaled import quantize_rescaled
from edgeforge.calibration.sequential import quantize_sequentially
from edgeforge.calibration.text import CalibrationRun
from edgeforge.stage_progress import Progress
from quant.plans.plan import QuantPlan, calibrated_weights
from quant.store.fill import fill_store
from quant.store.partial import PartialStore


def fill_calibrated(
    run: CalibrationRun,
    plan: QuantPlan,
    partial: PartialStore,
    threads: int | None,
    progress: Progress,
) -> None:
    """Fills a store in three passes.

    First come the weights that need no calibration, then those that need the activations of the
    float program, then those that need the activations of the quantized program.

    Args:
        run: the model, its program and the text.
        plan: the format and algorithm of each weight.
        partial: the store; weights that it marks as done are not quantized again.
        threads: number of threads; None for one per processor, at most four.
        progress: called as each stage advances.

    Raises:
        QuantizationError: activations are not finite, or a weight cannot be quantized; the message
            names the weight.
        UsageError: the calibration text is missing or was changed.
    """
    weights = run.model.weights
    calibrated = set(calibrated_weights(plan))
    apart = {name: given for name, given in plan.weights.items() if name not in calibrated}
    if not apart.keys() <= partial.done.keys():
        size = sum(math.prod(weights.shapes()[name]) for name in apart)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("quantize", done, size)

        fill_store(
            weights, QuantPlan(plan.recipe, apart), partial, threads=threads, progress=advance
        )
        partial.keep()
    program = run.program()
    calibration = run.sequences(progress)
    assert calibration.blocks is not None
    for note in calibration.notes:
        progress(note, 0, 0)
    filling = Filling(
        weights,
        plan,
        partial,
        threads=threads,
        progress=lambda done, size: progress("calibrate", done, size),
    )
    filling.report()
    quantize_rescaled(filling, program, calibration.blocks)
    quantize_sequentially(filling, program, calibration.blocks)
