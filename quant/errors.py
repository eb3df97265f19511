"""The errors that the package `quant` raises."""

from __future__ import annotations


class QuantizationError(ValueError):
    """A weight, a format or a plan does not allow the requested quantization."""


class StoreFullError(QuantizationError):
    """The disk, a quota or a file size limit leaves no room for a weight store."""


class StoreDamagedError(QuantizationError):
    """A weight store's files are not as they were written; it can only be made again."""


class StoreUnreadableError(QuantizationError):
    """The system does not let a weight store be read now; the store itself may be whole."""
