"""A sound export up to the point where files are written, so that faults can be written instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from edgeforge import pipeline
from edgeforge.export_options import ExportOptions, ExportRun
from edgeforge.model.model import Model
from edgeforge.trace_and_quantize import TracedAndQuantized
from exporters.target import ExportRequest, Target
from quant.program.program import Program


@dataclass(frozen=True)
class Captured:
    """All that a target's files are written from.

    Attributes:
        run: the export.
        target: the target.
        program: the program, in the quantized dialect.
        made: the checkpoint's digest and the weight store.
        warnings: what the manifest must say.
        request: what the target is given.
    """

    run: ExportRun
    target: Target
    program: Program
    made: TracedAndQuantized
    warnings: tuple[str, ...]
    request: ExportRequest


def capture(
    model: Model, targets: Sequence[Target], options: ExportOptions, out: Path
) -> dict[str, Captured]:
    """Exports a model to a folder, writes nothing there, and returns what would be written."""
    found: dict[str, Captured] = {}

    def keep(run, target, program, made, ranges, columns, warnings, folder, progress) -> None:
        request = pipeline.request_of(run, target, program, made, ranges, columns)
        found[target.name] = Captured(run, target, program, made, warnings, request)

    with patch.object(pipeline, "write_artifact", keep):
        pipeline.export(model, targets, out, options)
    return found
