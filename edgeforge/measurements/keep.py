"""Where a measurement may be written: asked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeforge.errors import UsageError
from edgeforge.measurements.bench_file import BENCH, refuse_stranger
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.verification.artifacts import find_artifacts
from edgeforge.verification.report_file import REPORT
from exporters.manifest import MANIFEST, MODULE_MANIFEST, Manifest
from exporters.modules.manifest import ModuleManifest, is_module


def refuse_places(
    folders: Sequence[Path], out: Path | None, history: Path | None, *, beside: bool
) -> None:
    """Refuses places where a measurement would replace what is not one.

    Args:
        folders: artifacts, or folders that hold some.
        out: the file to write; None for none.
        history: the file to add to; None for none.
        beside: whether ``bench.json`` in each artifact is written where there is no ``out``.

    Raises:
        UsageError: something else lies there, or would be lost.
        ExportError: a folder is no artifact.
    """
    artifacts = find_artifacts(folders)
    inputs = [
        Input("the artifact's file", folder / name)
        for folder in artifacts
        for name in _files(folder)
    ]
    for path, name in ((out, "--out"), (history, "--history")):
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{name} {path} is a folder: name a file in it")
        refuse_inputs(path, inputs, name)
    if out is not None and history is not None:
        refuse_inputs(history, [Input("the file of --out", out)], "--history")
    written = [folder / BENCH for folder in artifacts if beside] if out is None else [out]
    for path in written:
        refuse_stranger(path)


def _files(folder: Path) -> list[str]:
    if is_module(folder):
        return [MODULE_MANIFEST, REPORT, *ModuleManifest.read(folder).files]
    return [MANIFEST, REPORT, *Manifest.read(folder).files]
