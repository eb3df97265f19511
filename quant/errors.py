"""The errors that the package `quant` raises."""

from __future__ import annotations


class QuantizationError(ValueError):
    """A weight, a format or a plan does not allow the requested quantization."""


class Refusal(ValueError):
    """A weight cannot be as a plan says, and can be otherwise; whoever refuses says both.

    Attributes:
        problem: what does not fit, without what to do instead.
    """

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}: {advice}")
        self.problem = problem


class FormatRefused(Refusal, QuantizationError):
    """A weight cannot be stored as a plan says; another format can hold it."""


class StoreFullError(QuantizationError):
    """The disk, a quota or a file size limit leaves no room for a weight store."""


class StoreDamagedError(QuantizationError):
    """A weight store's files are not as they were written; it can only be made again."""


class StoreUnreadableError(QuantizationError):
    """The system does not let a weight store be read now; the store itself may be whole."""
