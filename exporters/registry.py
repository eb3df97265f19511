"""Targets by the name that the command line takes.

To add a target, add a folder for it, import its class here and add a row to `TARGETS`.
"""

from __future__ import annotations

import difflib

from exporters.coreml.target import CoremlTarget
from exporters.errors import ExportError
from exporters.executorch.target import ExecutorchTarget
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
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ExportError(f"there is no target {name!r}{hint}; known: {', '.join(TARGETS)}")
