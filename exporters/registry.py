"""Targets by the name that the command line takes.

To add a target, add a folder for it, import its class here and add a row to `TARGETS`.
"""

from __future__ import annotations

from exporters.coreml.target import CoremlTarget
from exporters.executorch.target import ExecutorchTarget
from exporters.lookup import look_up
from exporters.onnx.target import OnnxTarget
from exporters.target import Target

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
    return look_up(name, TARGETS)
