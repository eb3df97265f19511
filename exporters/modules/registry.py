"""Targets of modules by the name that the command line takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from exporters.lookup import look_up
from exporters.modules.coreml import CoremlModules
from exporters.modules.executorch import ExecutorchModules
from exporters.modules.onnx.target import OnnxModules
from exporters.modules.target import ModuleTarget

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
    return look_up(name, MODULE_TARGETS)
