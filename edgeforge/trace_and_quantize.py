"""Tracing and quantizing beside each other: neither needs what the other makes.

Tracing is Python and reads no weight. Hashing and quantizing read weights, spend their time outside
the interpreter, and need the program only where a quantizer looks at activations.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

from edgeforge.calibration.text import CalibrationRun
from edgeforge.checkpoint.checkpoint import CheckpointDigest
from edgeforge.export_options import ExportRun
from edgeforge.stage_progress import Progress
from edgeforge.weight_store import quantize
from quant.program.program import Program
from quant.store.store import WeightStore

_HAND_OVER_SECONDS = 0.0002


@dataclass(frozen=True)
class TracedAndQuantized:
    """What the two stages made.

    Attributes:
        program: in the float dialect.
        digest: of the checkpoint.
        store: every weight of the plan.
    """

    program: Program
    digest: CheckpointDigest
    store: WeightStore


def trace_and_quantize(run: ExportRun, progress: Progress) -> TracedAndQuantized:
    """Traces the model in this thread while another one hashes and quantizes its weights.

    Args:
        run: the export.
        progress: told of each stage, from both threads.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        QuantizationError: a weight cannot be quantized.
        DialectError: the traced program is outside of the float dialect.
    """
    with (
        ThreadPoolExecutor(1) as background,
        _set_at_exit() as left,
        _cancelled_at_exit() as traced,
    ):
        quantizing = background.submit(_hash_and_quantize, run, traced, left, progress)
        program = _trace(run, progress)
        traced.set_result(program)
        digest, store = quantizing.result()
    return TracedAndQuantized(program, digest, store)


@contextmanager
def shared_interpreter() -> Iterator[None]:
    """Makes room for threads that work beside a long stretch of Python.

    They need the interpreter for an instant between blocks, and would wait 5 ms for it each time.
    The garbage collector would walk, again and again, what importing torch allocates.
    """
    was_on, interval = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(_HAND_OVER_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if was_on:
            gc.enable()


def _trace(run: ExportRun, progress: Progress) -> Program:
    """The float program: the one that was needed before, or traced now."""
    progress("trace", 0, 0)
    with shared_interpreter():
        from edgeforge.model.trace import trace
        from quant.program.dialect import check_float

        program = run.program or trace(run.model.spec, run.facts.context)
    check_float(program)
    return program


def _hash_and_quantize(
    run: ExportRun, traced: Future[Program], left: Event, progress: Progress
) -> tuple[CheckpointDigest, WeightStore]:
    """The work of the other thread; it stops at its next report once the export was left."""

    def report(stage: str, done: int, size: int) -> None:
        if left.is_set():  # the export has failed or was interrupted
            raise CancelledError
        progress(stage, done, size)

    model, options, calibration = run.model, run.options, None
    digest = model.checkpoint.digest(lambda done, size: report("hash", done, size))
    if run.calibration is not None:
        calibration = CalibrationRun(model, run.calibration, traced.result, options.resume)
    plan = run.planned.plan
    store = quantize(model.weights, digest, plan, options.threads, report, calibration)
    return digest, store


@contextmanager
def _set_at_exit() -> Iterator[Event]:
    """An event that is set once the block is left, in whichever way."""
    event = Event()
    try:
        yield event
    finally:
        event.set()


@contextmanager
def _cancelled_at_exit() -> Iterator[Future[Program]]:
    """A program to come; whoever waits for it is released once the block is left without it."""
    future: Future[Program] = Future()
    try:
        yield future
    finally:
        future.cancel()
