"""The errors that the package `quant` raises."""

from __future__ import annotations


class QuantizationError(ValueError):
    """A weight, a format or a plan does not allow the requested quantization."""


class StoreFullError(QuantizationError):
    """The disk, a quota or a file size limit leaves no room for a weight store."""
