"""The errors that the exporters raise."""

from quant.errors import Refusal


class ExportError(ValueError):
    """A target cannot hold the program, the plan or the context, or an artifact is damaged."""


class MemoryRefused(ExportError):
    """A model does not fit the memory that the user states.

    Attributes:
        largest: the longest context that fits, tokens; 0 where none does.
    """

    def __init__(self, message: str, largest: int) -> None:
        super().__init__(message)
        self.largest = largest


class WeightRefused(Refusal, ExportError):
    """A target cannot hold a weight as a plan says; it can hold another format."""
