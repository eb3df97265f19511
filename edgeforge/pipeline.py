"""From a checkpoint to artifacts: one function, about one line a stage."""

from __future__ import annotations

import gc
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from edgeforge.cache import cache_dir
from edgeforge.calibration import Calibration, CalibrationOptions, CalibrationRun, calibration_for
from edgeforge.checkpoint import CheckpointDigest
from edgeforge.errors import UsageError
from edgeforge.mixing import Budget
from edgeforge.model import Model
from edgeforge.model_card import provenance
from edgeforge.output import atomic_folder
from edgeforge.planning import Planned, choose_plan
from edgeforge.spec import ModelSpec
from edgeforge.weights import CheckpointWeights
from exporters.manifest import Manifest, WeightRecord, record_files
from exporters.options import TargetOptions, check_options, not_applied
from exporters.structure import to_json
from exporters.target import ExportRequest, Lowered, ModelFacts, Target
from quant.formats import ScaleName
from quant.plan import QuantPlan
from quant.program import Program
from quant.store import WeightStore

if TYPE_CHECKING:
    from edgeforge.rotated import Rotated
    from exporters.target import CacheRanges

# Longer contexts are a choice: their caches and tables cost memory on every phone.
DEFAULT_CONTEXT = 4096
_HAND_OVER_SECONDS = 0.0002
_TOOLS = ("edgeforge", "torch", "onnx", "onnxruntime")

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it, and its size (0 when that is not known)."""


@dataclass(frozen=True)
class ExportOptions:
    """What a user asks of an export.

    Attributes:
        recipe: a name of `quant.recipes` or `edgeforge.planning`, or a YAML file; None for the
            checkpoint's natural one.
        context: declared context in tokens; None for the model's own, 4096 at most.
        force: replace an existing output folder.
        threads: for quantization; None for one per processor, four at most.
        target: what targets are asked beyond the recipe.
        calibration: the text that calibrated algorithms look at activations on.
        resume: folder of the partial results of calibration; None for one in the cache.
        imported_scales: what scales of imported weights are kept in.
        budget: of a mixed recipe.
        save_plan: file that the plan is written to as a recipe.
        rotation: a name of `edgeforge.rotations`; None for the recipe's own, if it has one.
    """

    recipe: str | None = None
    context: int | None = None
    force: bool = False
    threads: int | None = None
    target: TargetOptions = field(default_factory=TargetOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    resume: Path | None = None
    imported_scales: ScaleName = "float16"
    budget: Budget = field(default_factory=Budget)
    save_plan: Path | None = None
    rotation: str | None = None


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
            from edgeforge.trace import trace
            from quant.dialect import check_float, check_quantized
            from quant.rewrite import quantize_program

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
    from quant.quantize import fill_store
    from quant.registry import calibrated_weights
    from quant.store import find_store, new_store, store_key

    cache = cache_dir() / "stores"
    if not calibrated_weights(plan):
        run = None  # a text for caches alone is nothing to weights
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

    from edgeforge.calibrated_store import fill_calibrated
    from quant.resume import partial_store

    with partial_store(cache, key, plan, weights.shapes(), run.resume) as partial:
        fill_calibrated(run, plan, partial, threads, progress)
    return WeightStore(cache / key)


def _rotated(
    model: Model, options: ExportOptions, context: int, progress: Progress
) -> Rotated | None:
    """The rotated model, where one is asked for."""
    from edgeforge.planning import rotation_of

    name = rotation_of(options)
    if name is None:
        return None
    progress("trace", 0, 0)
    with shared_interpreter():
        from edgeforge.rotated import rotate
    return rotate(model, name, context)


def _cache_ranges(
    program: Program, store: WeightStore, calibration: Calibration | None, progress: Progress
) -> CacheRanges:
    from edgeforge.cache_ranges import cache_ranges

    assert calibration is not None and calibration.blocks is not None
    return cache_ranges(
        program,
        store,
        calibration.blocks,
        cache_dir() / "cache-ranges",
        lambda done, size: progress("calibrate caches", done, size),
    )


def facts_of(spec: ModelSpec, context: int) -> ModelFacts:
    """What targets must know of a model, at a declared context."""
    return ModelFacts(
        model_type=spec.model_type,
        hidden_size=spec.hidden_size,
        head_dim=spec.head_dim,
        num_heads=tuple(layer.num_heads for layer in spec.layers),
        num_kv_heads=tuple(layer.num_kv_heads for layer in spec.layers),
        bos=spec.bos,
        eos=spec.eos,
        pad=spec.pad,
        context=context,
    )


def _copy_sidecars(checkpoint: Path, folder: Path) -> None:
    """Keeps what says how the model is configured and sampled."""
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _manifest(
    model: Model,
    digest: CheckpointDigest,
    planned: Planned,
    calibration: Calibration | None,
    store: WeightStore,
    target: Target,
    request: ExportRequest,
    lowered: Lowered,
    passed_over: Sequence[str],
) -> Manifest:
    from edgeforge.rope import uses_long_set

    checkpoint, spec, context = model.checkpoint, model.spec, request.facts.context
    plan, notes = planned.plan, [*lowered.notes, *planned.notes]
    if spec.rope.scaling == "longrope":
        chosen = "long" if uses_long_set(spec.rope, context) else "short"
        notes.append(
            f"longrope: the {chosen} factors apply at every position, as the declared context of "
            f"{context} tokens decides (the original context is {spec.rope.original_context})"
        )
    if calibration is not None:
        notes.extend(calibration.notes)
    notes.extend(passed_over)
    shapes = {name: weight.shape for name, weight in spec.weights.items()}
    return Manifest(
        target=target.name,
        entry=lowered.entry,
        recipe=plan.recipe,
        context=context,
        source={
            "model": checkpoint.source,
            "path": str(checkpoint.path.resolve()),
            "revision": checkpoint.revision,
            "sha256": digest.sha256,
            "files": {file.name: file.sha256 for file in digest.files},
        },
        model={**spec.summary(), "ignored_config": list(model.ignored_config)},
        bits_per_weight=plan.bits_per_weight(shapes, spec.num_parameters),
        weights={
            name: WeightRecord(
                shape=shapes[name],
                format=assignment.format.name,
                algorithm=assignment.algorithm,
                relative_error=store.relative_error[name],
                digest=store.digests[name],
                activation=assignment.activation,
            )
            for name, assignment in plan.weights.items()
        },
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        states=lowered.states,
        notes=tuple(notes),
        options=request.options.given(),
        calibration={} if calibration is None else calibration.record(),
        rotation=planned.rotation,
        tools=versions(_TOOLS),
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by package name."""
    return {name: version(name) for name in packages}
