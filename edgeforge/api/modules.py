"""Functions for any PyTorch module: its export, and what verifies the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeforge.modules.samples import Arrays
    from edgeforge.modules.trace import DynamicShapes
    from edgeforge.modules.values import Example
    from edgeforge.modules.verify import ModuleEvaluation
    from edgeforge.stage_progress import Progress


def export_module(
    module: Any,
    example_inputs: Example,
    out: str | Path,
    *,
    dynamic_shapes: DynamicShapes = None,
    targets: Sequence[str] = ("onnx",),
    recipe: str = "int8",
    inputs: Sequence[Arrays] = (),
    calibration: Sequence[Arrays] = (),
    seed: int = 0,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Traces, quantizes and writes any PyTorch module.

    Args:
        module: a ``torch.nn.Module`` in float32 on the CPU; it is traced in evaluation mode.
        example_inputs: what to trace it with: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Numbers, texts, booleans and None among them become constants.
        out: the output folder; it appears only when everything in it is complete.
        dynamic_shapes: by input, ``{axis: torch.export.Dim}``; None where all sizes are fixed.
        targets: ``onnx``, ``coreml`` and ``executorch``. A single target's artifact is ``out``
            itself; those of several targets are folders in it.
        recipe: ``int8`` (the default), ``int4``, ``int4-gptq``, another recipe of symmetric
            integers, ``fp32``, or a YAML file of rules.
        inputs: inputs to verify on, by input name; by default the example inputs and random ones.
        calibration: inputs that GPTQ is given, by input name; by default ``inputs``, or else the
            example inputs.
        seed: of the random inputs.
        force: whether to replace an existing output folder.
        threads: for quantization; None for one per processor, at most four.
        progress: called with a stage's name, how much of it is done, and its size.

    Returns:
        The artifacts' folders, in the order of ``targets``.

    Raises:
        UsageError: the module, an input or an option cannot be used.
        ExportError: a target cannot write the module.
    """
    from edgeforge.modules.export import export
    from edgeforge.modules.options import ModuleOptions
    from edgeforge.stage_progress import no_progress
    from exporters.modules.registry import find_module_target

    return export(
        module,
        example_inputs,
        dynamic_shapes,
        [find_module_target(name) for name in targets],
        Path(out),
        ModuleOptions(
            recipe=recipe,
            inputs=inputs,
            calibration=calibration,
            seed=seed,
            force=force,
            threads=threads,
        ),
        progress or no_progress,
    )


def verify_module(artifact: str | Path, *, threads: int | None = None) -> ModuleEvaluation:
    """Runs every check on an artifact of a module and writes ``report.json`` into it.

    Args:
        artifact: a folder that `export_module` wrote.
        threads: for the runtime; None for its default.

    Raises:
        CheckFailed: files, integers or scales were changed, or an output is out of its bound.
    """
    from edgeforge.modules.verify import verify

    return verify(Path(artifact), threads)
