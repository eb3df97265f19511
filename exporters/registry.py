"""Targets by the name that the command line takes.

To add a target, add a folder for it, import its class here and add a row to `TARGETS`.
"""

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
    """Returns the target of this name.

    Raises:
        ExportError: there is no target of this name.
    """
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(name, TARGETS)
    raise ExportError(f"there is no target {name!r}{hint}; known: {', '.join(TARGETS)}")
