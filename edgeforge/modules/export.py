"""The export of a module: trace, plan, quantize, run the references, lower, manifest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeforge.artifact_manifest import versions
from edgeforge.modules.options import ModuleOptions
from edgeforge.output_folder.atomic import atomic_folder, check_output
from edgeforge.output_folder.inputs import Input
from edgeforge.stage_progress import Progress, no_progress
from exporters.manifest import record_files
from exporters.manifest_records import WeightRecord
from exporters.modules.manifest import SAMPLES, ModuleManifest
from exporters.modules.target import LoweredModule, ModuleRequest, ModuleTarget

if TYPE_CHECKING:
    from edgeforge.modules.trace import DynamicShapes
    from edgeforge.modules.values import Example
    from exporters.modules.traced import TracedModule

_TOOLS: Final = ("edgeforge", "torch", "onnx", "coremltools", "executorch", "torchao")


def export(
    module: object,
    example: Example,
    dynamic_shapes: DynamicShapes,
    targets: Sequence[ModuleTarget],
    out: Path,
    options: ModuleOptions,
    progress: Progress = no_progress,
) -> list[Path]:
    """Exports a module to every target from one trace and one quantization.

    Args:
        module: a `torch.nn.Module`, float32 and on the CPU.
        example: inputs to trace with: a tensor, a tuple of arguments or a dict of keyword ones.
        dynamic_shapes: by input, ``{axis: torch.export.Dim}``; None where all sizes are fixed.
        targets: the targets to write. A single target's artifact is ``out`` itself; those of
            several targets are folders in it.
        out: the output folder; it appears only when everything in it is complete.
        options: what the user asked for.
        progress: called as each stage advances.

    Raises:
        EdgeForgeError: the module, an input, an option or the output folder cannot be used.
        QuantizationError: the recipe or a weight is refused.
        ExportError: a target cannot write the module.
    """
    from edgeforge.modules.calibrate import Calibration
    from edgeforge.modules.plan import calibration_notes, plan_of, quantize
    from edgeforge.modules.samples import checked_calls, samples_of, write_samples
    from edgeforge.modules.trace import trace

    inputs = [Input("the file", path) for path in options.sidecars.values()]
    check_output(out, options.force, inputs)
    # One trace serves all targets.
    progress("trace", 0, 0)
    traced = trace(module, example, dynamic_shapes)
    # One quantization as well: all files hold the same integers.
    plan = plan_of(traced, options.recipe)
    calls = checked_calls(traced, options.calibration or options.inputs)
    store = quantize(traced, plan, options.threads, progress, Calibration(calls))
    notes = (*options.notes, *calibration_notes(traced, plan, calls, options))
    request = ModuleRequest(traced, store)
    # What the float and the quantized module give travels with each artifact, for `verify`.
    progress("run references", 0, 0)
    samples = samples_of(traced, store, options.inputs, options.seed)
    with atomic_folder(out, options.force, inputs=inputs) as partial:
        for target in targets:
            progress(f"write {target.name}", 0, 0)
            folder = partial if len(targets) == 1 else partial / target.name
            folder.mkdir(exist_ok=True)
            lowered = target.write(request, folder)
            write_samples(samples, folder / SAMPLES)
            for name, path in options.sidecars.items():
                shutil.copyfile(path, folder / name)
            _write_manifest(module, request, target, lowered, replace(options, notes=notes), folder)
    return [out if len(targets) == 1 else out / target.name for target in targets]


def _write_manifest(
    module: object,
    request: ModuleRequest,
    target: ModuleTarget,
    lowered: LoweredModule,
    options: ModuleOptions,
    folder: Path,
) -> None:
    from edgeforge.modules.digest import digest_of_tensors

    traced, store = request.traced, request.store
    weights = {}
    bits = 0.0
    if store is not None:
        shapes = {name: traced.weights[name].matrix for name in store.plan.weights}
        bits = store.plan.bits_per_weight(shapes)
        weights = {
            name: WeightRecord(
                shape=traced.weights[name].shape,
                format=assignment.format.name,
                algorithm=assignment.algorithm,
                relative_error=store.relative_error[name],
                digest=store.digests[name],
            )
            for name, assignment in store.plan.weights.items()
        }
    ModuleManifest(
        target=target.name,
        entry=lowered.entry,
        recipe=options.recipe,
        module=type(module).__name__,
        source=options.source,
        inputs={value.name: value.text for value in traced.inputs},
        outputs={value.name: value.text for value in traced.outputs},
        ranges=_ranges(traced),
        weights=weights,
        floats=lowered.floats,
        bits_per_weight=bits,
        tolerance=target.tolerance,
        notes=(*options.notes, *lowered.notes),
        tools=versions(_TOOLS),
        files=record_files(folder),
        source_sha256=digest_of_tensors({**traced.program.state_dict, **traced.program.constants}),
    ).write(folder)


def _ranges(traced: TracedModule) -> dict[str, str]:
    return {
        name: f"{least}..{'' if most is None else most}"
        for name, (least, most) in traced.ranges.items()
    }
