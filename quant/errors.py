"""The error that the quantization floor raises."""

from __future__ import annotations


class QuantizationError(ValueError):
    """A weight, a format or a plan that cannot be quantized as it was asked to be."""
