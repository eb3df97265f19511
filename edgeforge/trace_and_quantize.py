"""Traces a model and quantizes its weights at the same time, in two threads.

Tracing runs in Python and reads no weight. Hashing and quantizing read weights, spend their time
outside the interpreter, and need the traced program only where a quantizer uses activations.
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
from edgeforge.planning.advice import PlanCheck
from edgeforge.stage_progress import Progress
from edgeforge.weight_store import quantize
from quant.errors import FormatRefused
from quant.program.program import Program
from quant.store.store import WeightStore

# How long a thread may keep the interpreter while others wait; Python's default is 0.005.
_HAND_OVER_SECONDS = 0.0002


@dataclass(frozen=True)
class TracedAndQuantized:
    """The results of tracing and of quantizing.

    Attributes:
        program: the traced program, in the float dialect.
        digest: the checkpoint's digest.
        store: every weight of the plan, quantized.
    """

    program: Program
    digest: CheckpointDigest
    store: WeightStore


def trace_and_quantize(run: ExportRun, progress: Progress) -> TracedAndQuantized:
    """Traces the model in this thread while another thread hashes and quantizes its weights.

    Args:
        run: the export.
        progress: called as each stage advances, from both threads.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        QuantizationError: a weight cannot be quantized.
        DialectError: the traced program has an operator outside the float dialect.
    """
    with (
        ThreadPoolExecutor(1) as background,
        _set_at_exit() as left,
        _cancelled_at_exit() as traced,
    ):
        quantizing = background.submit(_hash_and_quantize, run, traced, left, progress)
        program = _trace(run, progress)
        traced.set_result(program)
        try:
            digest, store = quantizing.result()
        except FormatRefused as error:  # a value that the weight's format cannot hold
            plan, options = run.planned.plan, run.options.target
            check = PlanCheck(run.model.weights.shapes(), run.targets, run.facts, options)
            raise check.beyond_range(error, plan) from error
    return TracedAndQuantized(program, digest, store)


@contextmanager
def shared_interpreter() -> Iterator[None]:
    """Lets other threads have the interpreter more often during long-running Python code.

    Threads that quantize need the interpreter for an instant between blocks of rows, and would wait
    5 ms for it each time. The garbage collector is off, because it would walk the many objects that
    importing torch allocates again and again.
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
    """Returns the float program: the one that an earlier stage traced, or one traced now."""
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
    """Does the work of the other thread; stops at its next report once the export has ended."""

    def report(stage: str, done: int, size: int) -> None:
        if left.is_set():  # the export failed or was interrupted
            raise CancelledError
        progress(stage, done, size)

    model, options, calibration = run.model, run.options, None
    digest = model.checkpoint.digest(lambda done, size: report("hash", done, size))
    if run.calibration is not None:
        calibration = CalibrationRun(model, run.calibration, traced.result, options.resume)
    plan = run.planned.plan
    store = quantize(
        model.weights,
        digest,
        plan,
        options.threads,
        report,
        calibration,
        unchanged=run.require_unchanged,
    )
    return digest, store


@contextmanager
def _set_at_exit() -> Iterator[Event]:
    """Yields an event that is set when the block ends, normally or by an exception."""
    event = Event()
    try:
        yield event
    finally:
        event.set()


@contextmanager
def _cancelled_at_exit() -> Iterator[Future[Program]]:
    """Yields the future of a program; cancels it at the end, so that no thread waits for ever."""
    future: Future[Program] = Future()
    try:
        yield future
    finally:
        future.cancel()
