"""What calibration keeps of a matrix's inputs: ``sum(x x^T)``, the Hessian of its output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.errors import QuantizationError

# Columns whose products are computed together; the panels below the diagonal are left out.
PANEL: Final = 1024


@dataclass(frozen=True)
class InputStatistics:
    """What calibration keeps of the inputs of a matrix.

    Attributes:
        moment: ``float64[columns, columns]``, the mean of ``x x^T`` over tokens.
        largest: ``float32[columns]``, the largest absolute value of every column.
    """

    moment: torch.Tensor
    largest: torch.Tensor


def check_moment(moment: torch.Tensor, columns: int, name: str) -> None:
    """Refuses a second moment of another width than a weight's.

    Raises:
        QuantizationError: says both.
    """
    if moment.shape != (columns, columns):
        raise QuantizationError(
            f"{name} has {columns} input columns; its second moment is {list(moment.shape)}"
        )


class SecondMoment:
    """``sum(x x^T)`` over tokens: products of a batch in float32, their sum in float64.

    The squared error of ``x @ w`` over the tokens is a quadratic form in the error of ``w`` with
    this matrix, so it is all that a layer-wise quantizer needs to know of the text.

    Args:
        columns: width of the inputs.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.tokens = columns, 0
        self._upper = torch.zeros(columns, columns, dtype=torch.float64)
        self._largest = torch.zeros(columns)

    def add(self, x: torch.Tensor) -> None:
        """Adds ``float32[tokens, columns]``."""
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            self._upper[:stop, start:stop] += x[:, :stop].t() @ x[:, start:stop]
        for reach in (x.amax(0), -x.amin(0)):  # without a copy, as x.abs() would be
            self._largest = torch.maximum(self._largest, reach)
        self.tokens += len(x)

    def largest(self) -> torch.Tensor:
        """``float32[columns]``: the largest absolute value of every column."""
        return self._largest

    def mean(self) -> torch.Tensor:
        """``float64[columns, columns]``, symmetric: the mean over tokens. Ends the collection."""
        whole, self._upper = self._upper, torch.empty(0)
        whole /= max(1, self.tokens)
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            whole[start:stop, :start] = whole[:start, start:stop].t()
        return whole
