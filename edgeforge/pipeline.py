"""From a checkpoint to artifacts: one function, one line a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.artifact_manifest import facts_of, write_manifest
from edgeforge.cache import cache_dir
from edgeforge.calibration.text import calibration_for
from edgeforge.checkpoint.model_card import provenance
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions, ExportRun, has_static_caches
from edgeforge.families.spec import ModelSpec
from edgeforge.model.model import Model
from edgeforge.output_folder import atomic_folder
from edgeforge.planning.choose import choose_plan, rotation_of
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.trace_and_quantize import TracedAndQuantized, shared_interpreter, trace_and_quantize
from exporters.checks import check_options, not_applied
from exporters.target import ExportRequest, Target

if TYPE_CHECKING:
    from edgeforge.model.rotated_weights import Rotated
    from exporters.target import CacheRanges
    from quant.program.program import Program

# Longer contexts are a choice: their caches and tables cost memory on every phone.
DEFAULT_CONTEXT = 4096


def export(
    model: Model,
    targets: Sequence[Target],
    out: Path,
    options: ExportOptions,
    progress: Progress = no_progress,
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
    # The declared context comes first: rotary tables, caches and memory all follow from it.
    context = choose_context(model.spec, options.context)
    # An option that no target takes is refused here, and one that only some take is told of.
    apply_options(options, targets, progress)
    # A rotation changes what every later stage reads, so it comes before all of them.
    rotated = rotate_if_asked(model, options, context, progress)
    model = model if rotated is None else rotated.model
    # The plan says what each weight becomes, so that it can be refused before a weight is read.
    facts = facts_of(model.spec, context)
    planned = choose_plan(model, options.plan_request(targets, facts, rotated), progress)
    # Each target refuses now what its format, its kernels or the device's memory cannot hold.
    for target in targets:
        chosen = options.target.only(target.options)
        target.check(planned.plan, model.weights.shapes(), facts, chosen)
    # A calibration text that is too short, or the evaluation's own, is refused before the work too.
    calibration = calibration_for(
        planned.plan,
        model,
        options.calibration,
        context,
        looked_at=planned.program is not None,
        static_caches=any(has_static_caches(target, options.target) for target in targets),
    )
    run = ExportRun(model, targets, options, facts, planned, calibration)
    # Everything is written beside the output folder, which appears only when all of it is whole.
    with atomic_folder(out, options.force) as partial:
        # One trace and one quantization serve all targets.
        made = trace_and_quantize(run, progress)
        # The program now names integers and scales of the store in the place of float weights.
        program = rewrite(run, made)
        # Runtimes whose caches have fixed scales need to know how far keys and values reach.
        ranges = ranges_of_caches(run, program, made, progress)
        # Every target lowers the same program and copies the same integers.
        for target in targets:
            write_artifact(run, target, program, made, ranges, partial, progress)
    return [folder_of(target, targets, out) for target in targets]


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


def apply_options(options: ExportOptions, targets: Sequence[Target], progress: Progress) -> None:
    """Checks the options of targets, and tells which of them a target passes over.

    Raises:
        ExportError: no target takes an option, or one does not know its value.
    """
    check_options(options.target, targets)
    for target in targets:
        for note in not_applied(options.target, target):
            progress(note, 0, 0)


def rotate_if_asked(
    model: Model, options: ExportOptions, context: int, progress: Progress
) -> Rotated | None:
    """The rotated model and its program, where a rotation is asked for.

    Raises:
        UsageError: there is no such rotation, or the checkpoint holds integers.
    """
    name = rotation_of(options.recipe, options.rotation)
    if name is None:
        return None
    progress("trace", 0, 0)
    with shared_interpreter():
        from edgeforge.model.rotated_weights import rotate
    return rotate(model, name, context)


def rewrite(run: ExportRun, made: TracedAndQuantized) -> Program:
    """The program in the quantized dialect, checked.

    Raises:
        DialectError: it is outside of that dialect.
    """
    from quant.program.dialect import check_quantized
    from quant.program.rewrite import quantize_program

    program = quantize_program(made.program, run.planned.plan)
    check_quantized(program)
    return program


def ranges_of_caches(
    run: ExportRun, program: Program, made: TracedAndQuantized, progress: Progress
) -> CacheRanges:
    """How far keys and values reach on the calibration text; empty where no target asks for it."""
    if not run.static_caches:
        return {}
    from edgeforge.calibration.cache_ranges import cache_ranges

    assert run.calibration is not None and run.calibration.blocks is not None
    return cache_ranges(
        program,
        made.store,
        run.calibration.blocks,
        cache_dir() / "cache-ranges",
        lambda done, size: progress("calibrate caches", done, size),
    )


def write_artifact(
    run: ExportRun,
    target: Target,
    program: Program,
    made: TracedAndQuantized,
    ranges: CacheRanges,
    out: Path,
    progress: Progress,
) -> None:
    """Writes one target's files and their manifest.

    Raises:
        ExportError: the target cannot write the program after all.
    """
    progress(f"write {target.name}", 0, 0)
    folder = folder_of(target, run.targets, out)
    folder.mkdir(exist_ok=True)
    request = ExportRequest(
        program=program,
        store=made.store,
        facts=run.facts,
        tokenizer_files=run.model.checkpoint.tokenizer_files,
        generation=run.model.checkpoint.generation_config,
        options=run.options.target.only(target.options),
        provenance=provenance(run.model.checkpoint),
        cache_ranges=ranges if has_static_caches(target, run.options.target) else {},
    )
    lowered = target.write(request, folder)
    write_manifest(run, target, made, lowered, folder)


def folder_of(target: Target, targets: Sequence[Target], out: Path) -> Path:
    """Where a target's artifact lies: the output folder itself where it is the only one."""
    return out if len(targets) == 1 else out / target.name
