"""Exports what the command line names: a script's factory, or a folder of sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeforge.modules.export import export
from edgeforge.modules.factory import run_factory
from edgeforge.modules.options import ModuleOptions
from edgeforge.modules.sentence_transformers import is_sentence_folder, load, read_folder
from edgeforge.output_folder.atomic import check_output
from edgeforge.output_folder.inputs import Input
from edgeforge.stage_progress import Progress
from exporters.modules.target import ModuleTarget


def export_source(
    source: str,
    targets: Sequence[ModuleTarget],
    out: Path,
    options: ModuleOptions,
    progress: Progress,
) -> list[Path]:
    """Exports a module by its source.

    Args:
        source: ``script.py:factory``, or a folder.
        targets: the targets to write.
        out: the output folder.
        options: what the user asked for.
        progress: called as each stage advances.

    Raises:
        EdgeForgeError: the source, its module or the output folder cannot be used.
        ExportError: a target cannot write the module.
    """
    folder = Path(source).expanduser()
    if is_sentence_folder(folder):
        # An output folder that cannot be used is refused before the model is loaded.
        check_output(out, options.force, [Input("the model", folder, whole=True)])
        progress("load", 0, 0)
        found = read_folder(folder)
        made = load(found)
        options = replace(options, sidecars=found.sidecars, notes=found.notes)
    else:
        check_output(out, options.force)
        made = run_factory(source)
    return export(made.module, made.example, made.dynamic_shapes, targets, out, options, progress)
