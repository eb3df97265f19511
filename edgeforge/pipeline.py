"""The whole export from a checkpoint to artifacts: one function, one line per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.artifact_manifest import write_manifest
from edgeforge.cache import writable_cache
from edgeforge.calibration.text import CalibrationRun, calibration_for
from edgeforge.cards.write import write_cards
from edgeforge.checkpoint.adapter import open_adapters
from edgeforge.checkpoint.model_card import provenance
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.export_inputs import ExportInputs, inputs_of
from edgeforge.export_options import (
    ExportOptions,
    ExportRun,
    check_caches,
    check_drafts,
    has_static_caches,
)
from edgeforge.export_warnings import warnings_of, warnings_of_target
from edgeforge.families.facts import choose_context, facts_of
from edgeforge.model.low_rank import SeparateAdapter, check_adapters, refuse_rounded
from edgeforge.model.model import Model
from edgeforge.output_folder.atomic import atomic_folder, check_output
from edgeforge.planning.advice import check_targets
from edgeforge.planning.choose import choose_plan, rotation_of
from edgeforge.planning.plan_file import check_plan_file
from edgeforge.separate_adapters import write_adapters
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.tokenizer import check_tokenizer_files
from edgeforge.trace_and_quantize import TracedAndQuantized, shared_interpreter, trace_and_quantize
from exporters.checks import check_options
from exporters.float_columns import ALL, FloatColumns
from exporters.manifest import Manifest
from exporters.target import ExportRequest, Target

if TYPE_CHECKING:
    from edgeforge.model.rotated_weights import Rotated
    from exporters.target import CacheRanges
    from quant.program.program import Program


def export(
    model: Model,
    targets: Sequence[Target],
    out: Path,
    options: ExportOptions,
    progress: Progress = no_progress,
) -> list[Path]:
    """Exports a checkpoint to every target from one trace and one quantization.

    Args:
        model: the opened model.
        targets: the targets to write. A single target's artifact is ``out`` itself; those of
            several targets are folders in it.
        out: the output folder; it appears only when everything in it is complete.
        options: what the user asked for.
        progress: called as each stage advances.

    Returns:
        The artifacts' folders, in the order of ``targets``.

    Raises:
        EdgeForgeError: an option, the checkpoint or the output folder cannot be used.
        QuantizationError: the recipe or a weight is refused.
        ExportError: a target cannot write the model.
    """
    # What is read is listed first: no output may replace it, and it may not change from here on.
    inputs = inputs_of(model, options)
    check_output(out, options.force, inputs.inputs)
    check_plan_file(options.save_plan, inputs.inputs, out)
    # A damaged tokenizer is refused before any work: every target copies it.
    if model.checkpoint.tokenizer_refusal is not None:
        raise CheckpointError(model.checkpoint.tokenizer_refusal)
    check_tokenizer_files(model.checkpoint.tokenizer_files)
    # The declared context follows: rotary tables, caches and memory all depend on it.
    context = choose_context(model.spec, options.context)
    # Drafts need a text that can be taken back, whatever the target.
    check_drafts(model.spec, options.target)
    check_caches(model.spec, options.target)
    # Options that no target takes are refused here; those that only some take become warnings.
    check_options(options.target, targets)
    # Adapters that lie beside the weights must fit the base, and every target must take them.
    adapters = separate_adapters(model, targets, options, inputs)
    # A rotation changes what every later stage reads, so it comes before all of them.
    rotated = rotate_if_asked(model, options, context, progress)
    model = model if rotated is None else rotated.model
    # The plan says which format each weight gets; it is checked before any weight is read.
    beside = sum(adapter.numbers for adapter in adapters)
    facts = replace(facts_of(model.spec, context, beside), eos=model.eos)
    planned = choose_plan(model, options.plan_request(targets, facts, rotated), progress)
    # An adapter beside the weights takes activations as they are.
    rounded = {name: given.activation for name, given in planned.plan.weights.items()}
    adapted = [name for adapter in adapters for name in adapter.pairs]
    refuse_rounded(adapted, planned.plan.recipe, rounded)
    # Each target refuses a plan that its format, its kernels or the device's memory cannot hold.
    check_targets(planned.plan, model.weights.shapes(), targets, facts, options.target)
    # A calibration text that is too short or overlaps the held-out text is refused early as well.
    calibration = calibration_for(
        planned.plan,
        model,
        options.calibration,
        context,
        looked_at=planned.program is not None,
        static_caches=any(has_static_caches(target, options.target) for target in targets),
    )
    unchanged = inputs.require_unchanged
    run = ExportRun(model, targets, options, facts, planned, calibration, unchanged, adapters)
    # What a user must be told is known by now.
    warnings = warnings_of(run)
    # Files go to a temporary folder beside ``out``, which takes its name when all are complete.
    with (
        atomic_folder(out, options.force, inputs=inputs.inputs) as partial,
        # Digests, weights and copied files are of the same bytes only if nothing changes meanwhile.
        inputs.unchanged(),
    ):
        # One trace and one quantization serve all targets.
        made = trace_and_quantize(run, progress)
        # The program now refers to integers and scales in the store instead of float weights.
        program = rewrite(run, made)
        # Caches with fixed scales need the largest magnitudes of keys and values.
        ranges = ranges_of_caches(run, program, made, progress)
        # Kernels round activations to 8 bits; a few columns may be too large for that.
        columns = columns_that_stay_float(run, program, made, progress)
        # Every target lowers the same program and copies the same integers.
        for target in targets:
            write_artifact(run, target, program, made, ranges, columns, warnings, partial, progress)
    return [folder_of(target, targets, out) for target in targets]


def separate_adapters(
    model: Model, targets: Sequence[Target], options: ExportOptions, inputs: ExportInputs
) -> Sequence[SeparateAdapter]:
    """Returns the adapters that are to lie beside the weights, and watches their files.

    Raises:
        EdgeForgeError: one cannot be read, does not fit, or a target takes none.
        UsageError: the weights are to be rotated, and an adapter fits them as they were.
    """
    if not options.separate_adapters:
        return ()
    if rotation_of(options.recipe, options.rotation) is not None:
        raise UsageError(
            "--adapter-mode separate is not possible with a rotation: an adapter fits the weights "
            "as they were"
        )
    opened = open_adapters(options.separate_adapters)
    inputs.beside.watch(file for adapter in opened for file in adapter.files)
    names = [target.name for target in targets]
    return check_adapters(model, opened, names, options.target.given())


def rotate_if_asked(
    model: Model, options: ExportOptions, context: int, progress: Progress
) -> Rotated | None:
    """Returns the rotated model and its program, or None where no rotation is asked for.

    Raises:
        UsageError: there is no such rotation, or the checkpoint holds integers.
        QuantizationError: the program has no place for the rotation.
    """
    name = rotation_of(options.recipe, options.rotation)
    if name is None:
        return None
    progress("trace", 0, 0)
    with shared_interpreter():
        from edgeforge.model.rotated_weights import rotate
    return rotate(model, name, context)


def rewrite(run: ExportRun, made: TracedAndQuantized) -> Program:
    """Returns the program in the quantized dialect, checked.

    Raises:
        DialectError: the rewritten program has an operator outside that dialect.
    """
    from quant.program.dialect import check_quantized
    from quant.program.rewrite import quantize_program

    program = quantize_program(made.program, run.planned.plan)
    check_quantized(program)
    return program


def ranges_of_caches(
    run: ExportRun, program: Program, made: TracedAndQuantized, progress: Progress
) -> CacheRanges:
    """Returns the largest magnitudes of keys and values; empty where no target needs them."""
    if not run.static_caches:
        return {}
    from edgeforge.calibration.cache_ranges import cache_ranges

    assert run.calibration is not None
    calibration = CalibrationRun(run.model, run.calibration, lambda: made.program)
    blocks = calibration.sequences(progress).blocks
    assert blocks is not None
    return cache_ranges(
        program,
        made.store,
        blocks,
        writable_cache() / "cache-ranges",
        lambda done, size: progress("calibrate caches", done, size),
    )


def columns_that_stay_float(
    run: ExportRun, program: Program, made: TracedAndQuantized, progress: Progress
) -> FloatColumns:
    """Returns the columns whose activations no kernel may round, by weight; see `--activations`."""
    asked = run.options.target.activations or "auto"
    if asked == "int8" or not any("activations" in target.options for target in run.targets):
        return {}
    from edgeforge.calibration.float_columns import float_columns, rounded_weights, texts_of

    weights = rounded_weights(program)
    if asked == "float" or not weights:
        return dict.fromkeys(weights, ALL)
    return float_columns(
        program,
        made.store,
        texts_of(run.model, run.facts.context),
        writable_cache() / "float-columns",
        lambda done, size: progress("look at activations", done, size),
    )


def write_artifact(
    run: ExportRun,
    target: Target,
    program: Program,
    made: TracedAndQuantized,
    ranges: CacheRanges,
    columns: FloatColumns,
    warnings: tuple[str, ...],
    out: Path,
    progress: Progress,
) -> None:
    """Writes one target's files and their manifest.

    Raises:
        ExportError: the target finds only now that it cannot write the program.
    """
    progress(f"write {target.name}", 0, 0)
    folder = folder_of(target, run.targets, out)
    folder.mkdir(exist_ok=True)
    lowered = target.write(request_of(run, target, program, made, ranges, columns), folder)
    told = (*warnings, *warnings_of_target(run, target, lowered))
    beside = write_adapters(run.model, run.adapters, target.name, folder)
    write_manifest(run, target, made, lowered, told, folder, beside)
    # The card comes after the manifest, which does not list it: `verify` writes it anew.
    write_cards(folder, Manifest.read(folder), run.model.checkpoint, None)


def request_of(
    run: ExportRun,
    target: Target,
    program: Program,
    made: TracedAndQuantized,
    ranges: CacheRanges,
    columns: FloatColumns,
) -> ExportRequest:
    """Returns what a target is given to write."""
    return ExportRequest(
        program=program,
        store=made.store,
        facts=run.facts,
        tokenizer_files=run.model.checkpoint.tokenizer_files,
        generation=run.model.checkpoint.generation_config,
        options=run.options.target.only(target.options),
        provenance=provenance(run.model.checkpoint),
        cache_ranges=ranges if has_static_caches(target, run.options.target) else {},
        float_columns=columns if "activations" in target.options else {},
    )


def folder_of(target: Target, targets: Sequence[Target], out: Path) -> Path:
    """Returns the folder of a target's artifact: ``out`` itself where it is the only target."""
    return out if len(targets) == 1 else out / target.name
