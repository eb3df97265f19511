"""The command export-module, and what verify and inspect say of its artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeforge.cli import options as option
from edgeforge.cli.printable import json_text, printable, printable_lines

if TYPE_CHECKING:
    from edgeforge.modules.verify import ModuleEvaluation

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="script.py:factory, which is run and returns (module, example_inputs) or (module, "
        "example_inputs, dynamic_shapes); or a folder of sentence-transformers.",
    ),
]
ModuleRecipe = Annotated[
    str,
    typer.Option(
        help="int8, int4, int4-gptq, another recipe of symmetric integers, fp32, or a YAML file of "
        "rules."
    ),
]
ModuleTargets = Annotated[
    str, typer.Option(help="Targets, separated by commas: onnx, coreml and executorch.")
]
ModuleInputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--inputs",
        metavar="FILE",
        help="An .npz of inputs by name to verify on; repeat it for several calls. By default the "
        "example inputs and random ones.",
    ),
]
ModuleCalibration = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="An .npz of inputs by name to calibrate GPTQ on; repeat it for several calls. By "
        "default those of --inputs, or else the example inputs.",
    ),
]
InputSeed = Annotated[int, typer.Option(help="Seed of the random inputs.")]


def export_module(
    source: Source,
    out: option.Out,
    target: ModuleTargets = "onnx",
    recipe: ModuleRecipe = "int8",
    inputs: ModuleInputs = None,
    calibration: ModuleCalibration = None,
    seed: InputSeed = 0,
    force: option.Force = False,
    threads: option.Threads = None,
    quiet: option.Quiet = False,
) -> None:
    """Trace, quantize and write any PyTorch module, or a model of sentence-transformers."""
    from edgeforge.arrays_file import read_arrays
    from edgeforge.cli.progress import Reporter
    from edgeforge.modules.options import ModuleOptions
    from edgeforge.modules.source import export_source
    from edgeforge.sizes import size_text
    from exporters.modules.manifest import ModuleManifest
    from exporters.modules.registry import find_module_target

    targets = [find_module_target(name.strip()) for name in target.split(",")]
    options = ModuleOptions(
        recipe=recipe,
        source=source,
        inputs=[read_arrays(path) for path in inputs or ()],
        calibration=[read_arrays(path) for path in calibration or ()],
        seed=seed,
        force=force,
        threads=threads,
    )
    with Reporter(quiet) as progress:
        folders = export_source(source, targets, out, options, progress)
    for folder in folders:
        manifest = ModuleManifest.read(folder)
        size = size_text(sum(record.size for record in manifest.files.values()))
        held = f"{len(manifest.weights)} weights quantized"
        if manifest.floats:
            held += f", {len(manifest.floats)} of them held as floats"
        line = f"{folder}: {manifest.target}, {manifest.module}, {manifest.recipe}, {held}, {size}"
        print(printable(line))


def only_modules(folders: Sequence[Path]) -> Sequence[Path]:
    """The folders, all of which are artifacts of modules.

    Raises:
        UsageError: one is another artifact, whose checks take other options.
    """
    from edgeforge.errors import UsageError
    from exporters.modules.manifest import is_module

    others = [folder for folder in folders if not is_module(folder)]
    if others:
        raise UsageError(f"{others[0]} is no artifact of a module: verify it in a call of its own")
    return folders


def verify_modules(folders: Sequence[Path], threads: int | None, json: bool) -> None:
    """Verifies artifacts of modules and prints what came out.

    Raises:
        CheckFailed: an artifact was changed, or an output is out of its bound; all others are
            verified and printed first.
    """
    from edgeforge.errors import CheckFailed
    from edgeforge.modules.verify import evaluate, lines_of

    found: list[ModuleEvaluation] = []
    failures: list[str] = []
    for folder in folders:
        try:
            found.append(evaluate(folder, threads))
        except CheckFailed as failure:
            failures.append(str(failure))
    if json:
        print(json_text([each.to_json() for each in found]))
    else:
        for each in found:
            print(printable_lines(lines_of(each)))
    failures += [f"{each.artifact}: {words}" for each in found for words in each.failures]
    if failures:
        raise CheckFailed("; ".join(failures))


def inspect_module(folder: Path, json: bool) -> None:
    """Prints what an artifact of a module holds, and checks its files and integers."""
    from dataclasses import asdict

    from edgeforge.modules.verify import require_whole
    from exporters.modules.manifest import ModuleManifest

    manifest = ModuleManifest.read(folder)
    if json:
        print(json_text(asdict(manifest)))
    else:
        lines = [
            f"{folder}: {manifest.target} from {manifest.source or manifest.module}, recipe "
            f"{manifest.recipe}",
            *(f"input {name}: {kind}" for name, kind in manifest.inputs.items()),
            *(f"output {name}: {kind}" for name, kind in manifest.outputs.items()),
            *(f"{name} is {sizes}" for name, sizes in manifest.ranges.items()),
            *(
                f"{name}: {record.format}, relative error {record.relative_error:.3g}"
                + (f", float here: {manifest.floats[name]}" if name in manifest.floats else "")
                for name, record in manifest.weights.items()
            ),
            *(f"note: {note}" for note in manifest.notes),
        ]
        print(printable_lines(lines))
    require_whole(folder, manifest)
    if not json:
        print("all files are as written; integers and scales equal the manifest's digests")
