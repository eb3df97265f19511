"""States: tensors that functions read and write, and that keep their content between calls."""

from __future__ import annotations

import torch
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_shape
from device_harness.coreml_interpreter.values import storage
from exporters.coreml.package import TensorType


class State:
    """One state, which is all zeros at first.

    Args:
        name: the state's name in the program.
        kind: the state's type.

    Raises:
        DeviceError: the state is too large, or its type is unknown.
    """

    def __init__(self, name: str, kind: TensorType) -> None:
        self.name, self.kind = name, kind
        shape = check_shape(dim or 0 for dim in kind.shape)
        self.tensor = torch.zeros(shape, dtype=storage(kind.dtype, f"state {name}"))

    def write(self, value: Tensor) -> None:
        """Copies a value into the state, unless the value is the state's own memory."""
        if value is not self.tensor:
            self.tensor.copy_(value)
