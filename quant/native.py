"""The compiled kernels of ``quant/_kernels.c``, called by ctypes so that threads run freely."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from typing import Final

import torch

from quant.errors import QuantizationError
from quant.formats import IntFormat

_WEIGHT_KIND: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Outcome:
    """What quantizing some rows gave.

    Attributes:
        squared_error: Sum of ``(weight - stored value) ** 2``.
        squared_norm: Sum of ``weight ** 2``.
        bad_row: First row that cannot be quantized, or None when all could.
    """

    squared_error: float
    squared_norm: float
    bad_row: int | None


def interval(fmt: IntFormat, size: int) -> tuple[float, float]:
    """Ends of the searched scales of a group of ``size`` columns, in units of its reach.

    The reach is the largest magnitude of a symmetric group, and the distance from the lowest to
    the highest value, zero included, of an asymmetric one.
    """
    steps = fmt.max_code // 2 if fmt.symmetric else fmt.max_code
    if fmt.bits == 4:
        low, high = 1 / 64, 1.2 if size <= 32 else 1.1
        if not fmt.symmetric:
            low = 0.5 if size <= 256 else 1 / 16
    else:
        low, high = (1 / 64 if fmt.symmetric else 1 / 4), 1.02
    return low / (steps + 1), high / steps


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("quant._kernels")
    if spec is None or spec.origin is None:
        return None
    return None


def available() -> bool:
    """Whether the kernels were built when EdgeForge was installed."""
    return _library() is not None


def quantize_rows(
    weight: torch.Tensor,
    fmt: IntFormat,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> Outcome:
    """Quantize rows into contiguous buffers of the shapes that ``fmt.layout`` states."""
    raise QuantizationError("the compiled kernels are not available: reinstall with a C compiler")
