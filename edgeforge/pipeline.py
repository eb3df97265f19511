"""From a checkpoint to artifacts: one function, about one line a stage."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from edgeforge.artifact_manifest import _copy_sidecars, _manifest, facts_of
from edgeforge.cache import cache_dir
from edgeforge.calibration.text import (
    Calibration,
    CalibrationRun,
    calibration_for,
)
from edgeforge.checkpoint.checkpoint import CheckpointDigest
from edgeforge.checkpoint.model_card import provenance
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.families.spec import ModelSpec
from edgeforge.model.model import Model
from edgeforge.output_folder import atomic_folder
from edgeforge.planning.choose import choose_plan
from edgeforge.stage_progress import Progress
from edgeforge.weight_store import quantize
from exporters.checks import check_options, not_applied
from exporters.manifest import Manifest, record_files
from exporters.structure import to_json
from exporters.target import ExportRequest, Target
from quant.program.program import Program
from quant.store.store import WeightStore

if TYPE_CHECKING:
    from edgeforge.model.rotated_weights import Rotated
    from exporters.target import CacheRanges

# Longer contexts are a choice: their caches and tables cost memory on every phone.
DEFAULT_CONTEXT = 4096
_HAND_OVER_SECONDS = 0.0002


def export(
    model: Model,
    targets: Sequence[Target],
    out: Path,
    options: ExportOptions,
    progress: Progress = lambda stage, done, size: None,
) -> list[Path]:
    """Exports a checkpoint to every target from one trace and one quantization.

    Args:
        model: opened.
        targets: what to write. One target's artifact is ``out`` itself; several are folders in it.
        out: the output folder; it appears only when everything in it is whole.
        options: what the user asked for.
        progress: told of each stage.

    Returns:
        The artifacts' folders, in the order of ``targets``.

    Raises:
        EdgeForgeError: or a QuantizationError or ExportError; nothing is left half-written.
    """
    context = choose_context(model.spec, options.context)
    rotated = _rotated(model, options, context, progress)
    model = model if rotated is None else rotated.model
    checkpoint, spec, weights = model.checkpoint, model.spec, model.weights
    facts = facts_of(spec, context)
    check_options(options.target, targets)
    for note in (note for target in targets for note in not_applied(options.target, target)):
        progress(note, 0, 0)
    planned = choose_plan(model, options, targets, facts, progress, rotated)
    plan = planned.plan
    for target in targets:
        target.check(plan, weights.shapes(), facts, options.target.only(target.options))
    static = [target for target in targets if options.target.kv_cache in target.static_caches]
    calibration = calibration_for(
        plan,
        model,
        options.calibration,
        context,
        looked_at=planned.program is not None,
        static_caches=bool(static),
    )
    with (
        atomic_folder(out, options.force) as partial,
        ThreadPoolExecutor(1) as background,
        _set_at_exit() as left,
        _cancelled_at_exit() as traced,
    ):

        def report(stage: str, done: int, size: int) -> None:
            if left.is_set():  # the export has failed or was interrupted
                raise CancelledError
            progress(stage, done, size)

        def hash_and_quantize() -> tuple[CheckpointDigest, WeightStore]:
            digest = checkpoint.digest(lambda done, size: report("hash", done, size))
            run = None
            if calibration is not None:
                run = CalibrationRun(model, calibration, traced.result, options.resume)
            return digest, quantize(weights, digest, plan, options.threads, report, run)

        # Tracing is Python and needs no weight; hashing and quantizing are neither.
        quantizing = background.submit(hash_and_quantize)
        progress("trace", 0, 0)
        with shared_interpreter():
            from edgeforge.model.trace import trace
            from quant.program.dialect import check_float, check_quantized
            from quant.program.rewrite import quantize_program

            program = planned.program or (rotated.program if rotated else trace(spec, context))
        check_float(program)
        traced.set_result(program)
        digest, store = quantizing.result()
        program = quantize_program(program, plan)
        check_quantized(program)
        ranges = _cache_ranges(program, store, calibration, progress) if static else {}
        folders = []
        for target in targets:
            progress(f"write {target.name}", 0, 0)
            folder = partial if len(targets) == 1 else partial / target.name
            folder.mkdir(exist_ok=True)
            request = ExportRequest(
                program,
                store,
                facts,
                checkpoint.tokenizer_files,
                checkpoint.generation_config,
                options.target.only(target.options),
                provenance(checkpoint),
                ranges if target in static else {},
            )
            lowered = target.write(request, folder)
            _copy_sidecars(checkpoint.path, folder)
            passed_over = not_applied(options.target, target)
            manifest = _manifest(
                *(model, digest, planned, calibration, store, target, request, lowered),
                passed_over,
            )
            structure = to_json(target.structure(folder))
            found = {"files": record_files(folder), "structure": structure}
            Manifest(**{**vars(manifest), **found}).write(folder)
            folders.append(out if len(targets) == 1 else out / target.name)
    return folders


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


def choose_context(spec: ModelSpec, asked: int | None) -> int:
    """The declared context: what was asked, or the model's own up to `DEFAULT_CONTEXT`.

    Raises:
        UsageError: longer than the model was made for.
    """
    if asked is None:
        return min(spec.max_context, DEFAULT_CONTEXT)
    if not 2 <= asked <= spec.max_context:
        raise UsageError(
            f"--context {asked} is not possible: this model takes 2 to {spec.max_context} tokens"
        )
    return asked


def _rotated(
    model: Model, options: ExportOptions, context: int, progress: Progress
) -> Rotated | None:
    """The rotated model, where one is asked for."""
    from edgeforge.planning.choose import rotation_of

    name = rotation_of(options)
    if name is None:
        return None
    progress("trace", 0, 0)
    with shared_interpreter():
        from edgeforge.model.rotated_weights import rotate
    return rotate(model, name, context)


def _cache_ranges(
    program: Program, store: WeightStore, calibration: Calibration | None, progress: Progress
) -> CacheRanges:
    from edgeforge.calibration.cache_ranges import cache_ranges

    assert calibration is not None and calibration.blocks is not None
    return cache_ranges(
        program,
        store,
        calibration.blocks,
        cache_dir() / "cache-ranges",
        lambda done, size: progress("calibrate caches", done, size),
    )
