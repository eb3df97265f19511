"""Statistics of a matrix's inputs: ``sum(x x^T)``, the Hessian of its output error, and maxima."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.errors import QuantizationError
from quant.kernels.threads import run_all

# Columns in a panel of products: the matrix is symmetric, so a panel ends at the diagonal. Six of
# equal width skip two fifths of the products, and panels narrower than the first number multiply
# slowly. The widths depend on the matrix alone, so sums do not depend on the number of threads.
PANELS: Final = 6
NARROWEST, WIDEST = 192, 512


@dataclass(frozen=True)
class InputStatistics:
    """The statistics that calibration collects of a matrix's inputs.

    Attributes:
        moment: ``float64[columns, columns]``, the mean of ``x x^T`` over tokens.
        largest: ``float32[columns]``, the largest absolute value of every column.
        tokens: how many tokens of the text entered the matrix; of an expert's, those that chose it.
    """

    moment: torch.Tensor
    largest: torch.Tensor
    tokens: int = 0


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
        self.columns, self.tokens = columns, 0.0
        width = min(max(-(-columns // (PANELS * 32)) * 32, NARROWEST), WIDEST)
        # The panels furthest to the right are the largest: threads that take them first end early.
        self._panels = [(start, min(start + width, columns)) for start in range(0, columns, width)][
            ::-1
        ]
        self._upper = torch.zeros(columns, columns, dtype=torch.float64)
        self._largest = torch.zeros(columns)

    def add(self, x: torch.Tensor, weight: float = 1.0) -> None:
        """Adds the inputs of some tokens.

        Args:
            x: ``float32[tokens, columns]``; there may be no tokens.
            weight: as how many tokens each of them counts in the mean.
        """
        if not len(x):
            return

        def add_panel(panel: tuple[int, int]) -> None:
            start, stop = panel
            own = x[:, start:stop]
            product = x[:, :stop].t() @ own
            self._upper[:stop, start:stop] += product if weight == 1 else product * weight
            for reach in (own.amax(0), -own.amin(0)):  # own.abs() would copy the inputs
                self._largest[start:stop] = torch.maximum(self._largest[start:stop], reach)

        run_all(add_panel, self._panels, torch.get_num_threads())
        self.tokens += weight * len(x)

    def largest(self) -> torch.Tensor:
        """Returns the largest absolute value of every column, ``float32[columns]``."""
        return self._largest

    def mean(self) -> torch.Tensor:
        """Returns the mean over tokens, symmetric ``float64[columns, columns]``.

        It takes over the accumulated memory, so no tokens can be added afterwards.
        """
        whole, self._upper = self._upper, torch.empty(0)
        whole /= self.tokens or 1
        for start, stop in self._panels:
            whole[start:stop, :start] = whole[:start, start:stop].t()
        return whole
