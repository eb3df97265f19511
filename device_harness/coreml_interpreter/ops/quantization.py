"""Quantizes activations to 8-bit integers, and back (iOS 17)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.coreml_interpreter.values import STORAGE
from device_harness.errors import DeviceError

_REACH: Final = {"int8": (-128, 127), "uint8": (0, 255)}


def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """``clip(round(input / scale) + zero_point)``, one of each, or one a slice of ``axis``."""
    if output_dtype not in _REACH:
        raise DeviceError(f"quantize cannot give {output_dtype}; it gives int8 or uint8")
    steps = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        steps = steps + _along(zero_point, input, axis).to(steps.dtype)
    return steps.clamp(*_REACH[output_dtype]).to(STORAGE[output_dtype])


def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """``scale * (input - zero_point)``, one of each, or one a slice of ``axis``."""
    values = input.to(scale.dtype)
    if zero_point is not None:
        values = values - _along(zero_point, input, axis).to(scale.dtype)
    return values * _along(scale, input, axis)


def _along(parts: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if parts.dim() == 0:
        return parts
    shape = [1] * x.dim()
    shape[axis or 0] = -1
    return parts.reshape(shape)


OPS: Final[dict[str, Operation]] = {"quantize": quantize, "dequantize": dequantize}
