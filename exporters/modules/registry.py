"""Targets of modules by the name that the command line takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from exporters.errors import ExportError
from exporters.modules.coreml import CoremlModules
from exporters.modules.executorch import ExecutorchModules
from exporters.modules.onnx.target import OnnxModules
from exporters.modules.target import ModuleTarget
from quant.suggestion import did_you_mean

MODULE_TARGETS: Final[Mapping[str, ModuleTarget]] = {
    "onnx": OnnxModules(),
    "coreml": CoremlModules(),
    "executorch": ExecutorchModules(),
}


def find_module_target(name: str) -> ModuleTarget:
    """Returns the target of this name.

    Raises:
        ExportError: there is no target of this name.
    """
    if name in MODULE_TARGETS:
        return MODULE_TARGETS[name]
    hint = did_you_mean(name, MODULE_TARGETS)
    raise ExportError(f"there is no target {name!r}{hint}; known: {', '.join(MODULE_TARGETS)}")
