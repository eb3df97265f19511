"""Targets by the name the command line takes. To add one: a folder, an import, a row."""

from __future__ import annotations

from exporters.coreml.target import CoremlTarget
from exporters.errors import ExportError
from exporters.executorch.target import ExecutorchTarget
from exporters.onnx.target import OnnxTarget
from exporters.target import Target
from quant.suggestion import did_you_mean

TARGETS: dict[str, Target] = {
    "onnx": OnnxTarget(),
    "coreml": CoremlTarget(),
    "executorch": ExecutorchTarget(),
}


def find_target(name: str) -> Target:
    """A target by name.

    Raises:
        ExportError: there is none of that name.
    """
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(name, TARGETS)
    raise ExportError(f"there is no target {name!r}{hint}; known: {', '.join(TARGETS)}")
