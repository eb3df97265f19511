"""Statistics of a matrix's inputs: ``sum(x x^T)``, the Hessian of its output error, and maxima."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.errors import QuantizationError

# Columns in a panel of products. The matrix is symmetric, so panels below the diagonal are skipped.
PANEL: Final = 1024


@dataclass(frozen=True)
class InputStatistics:
    """The statistics that calibration collects of a matrix's inputs.

    Attributes:
        moment: ``float64[columns, columns]``, the mean of ``x x^T`` over tokens.
        largest: ``float32[columns]``, the largest absolute value of every column.
    """

    moment: torch.Tensor
    largest: torch.Tensor


def check_moment(moment: torch.Tensor, columns: int, name: str) -> None:
    """Refuses a second moment whose width is not the weight's.

    Raises:
        QuantizationError: the widths differ; the message states both.
    """
    if moment.shape != (columns, columns):
        raise QuantizationError(
            f"{name} has {columns} input columns; its second moment is {list(moment.shape)} and "
            f"must be [{columns}, {columns}]"
        )


class SecondMoment:
    """Accumulates ``sum(x x^T)`` over tokens: products of a batch in float32, sums in float64.

    The squared error of ``x @ w`` over the tokens is a quadratic form in the error of ``w``, and
    this is its matrix. So a layer-wise quantizer needs to know nothing else of the text.

    Args:
        columns: the inputs' width.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.tokens = columns, 0
        self._upper = torch.zeros(columns, columns, dtype=torch.float64)
        self._largest = torch.zeros(columns)

    def add(self, x: torch.Tensor) -> None:
        """Adds the inputs of some tokens, ``float32[tokens, columns]``."""
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            self._upper[:stop, start:stop] += x[:, :stop].t() @ x[:, start:stop]
        for reach in (x.amax(0), -x.amin(0)):  # x.abs() would copy the inputs
            self._largest = torch.maximum(self._largest, reach)
        self.tokens += len(x)

    def largest(self) -> torch.Tensor:
        """Returns the largest absolute value of every column, ``float32[columns]``."""
        return self._largest

    def mean(self) -> torch.Tensor:
        """Returns the mean over tokens, symmetric ``float64[columns, columns]``.

        It takes over the accumulated memory, so no tokens can be added afterwards.
        """
        whole, self._upper = self._upper, torch.empty(0)
        whole /= max(1, self.tokens)
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            whole[start:stop, :start] = whole[:start, start:stop].t()
        return whole
