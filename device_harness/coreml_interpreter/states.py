"""States: tensors that a function reads and writes, and that outlive a call."""

from __future__ import annotations

import torch
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_shape
from device_harness.coreml_interpreter.values import storage
from exporters.coreml.package import TensorType


class State:
    """One state, all zeros when it is made.

    Args:
        name: in the program.
        kind: its type.

    Raises:
        DeviceError: it is too large, or its type is unknown.
    """

    def __init__(self, name: str, kind: TensorType) -> None:
        self.name, self.kind = name, kind
        shape = check_shape(dim or 0 for dim in kind.shape)
        self.tensor = torch.zeros(shape, dtype=storage(kind.dtype, f"state {name}"))

    def write(self, value: Tensor) -> None:
        """Takes a value over."""
        if value is not self.tensor:
            self.tensor.copy_(value)
