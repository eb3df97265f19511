"""The error that the quantization floor raises."""

from __future__ import annotations


class QuantizationError(ValueError):
    """A weight, a format or a plan that cannot be quantized as it was asked to be."""


class StoreFullError(QuantizationError):
    """The disk, a quota or a file size limit leaves no room for a weight store."""
