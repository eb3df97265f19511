"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): moves activations' outliers into weights.

Where activations are rounded too, one activation column that is much larger than the others widens
the rounding steps of all columns, while weights have columns of similar size. So SmoothQuant
divides column ``j`` of the activations by ``s_j = max|X_j| ** a / max|W_j| ** (1 - a)`` and
multiplies the weight's column by it. At ``a = 0.5``, the paper's value, both then have the same
largest value in each column. The multiplied weight is rounded to nearest, by scales of least error
weighted by each column's inputs: the unweighted error would clip just those weights that took on an
outlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.kernels.threads import run_all
from quant.quantizers.input_statistics import InputStatistics
from quant.quantizers.rtn import QuantizedRows
from quant.quantizers.scale_search import rescaled_rounding, search_scales

EXPONENT: Final = 0.5
EXPONENTS: Final = tuple(step / 20 for step in range(21))
# The least magnitude that a factor is computed from: zeros would give factors of 0 or infinity.
_SMALLEST: Final = 1e-5
_SEARCHED_WEIGHTS: Final = 1 << 20


@dataclass(frozen=True)
class SmoothQuant:
    """The quantizers ``smoothquant`` and ``smoothquant-search``.

    Attributes:
        name: the name in `quant.quantizers.registry`.
        exponent: ``a``, from 0 for no part of the activations' range moved into weights to 1 for
            all of it; None to search it for each weight.
    """

    name: str = "smoothquant"
    exponent: float | None = EXPONENT

    def column_factors(
        self, weight: torch.Tensor, inputs: InputStatistics, fmt: IntFormat, ties: torch.Tensor
    ) -> torch.Tensor:
        """Returns the factor of every column of a weight; the inputs are divided by them.

        The search takes the exponent of the least expected error of the output. That error is the
        sum of two terms: the stored weight's, ``e^T H e``, and that of inputs rounded by one scale
        for all columns, whose error is taken as uniform over a step.

        Args:
            weight: float32 ``[rows, cols]``.
            inputs: the statistics of the inputs.
            fmt: the integer format to store.
            ties: int64 ``[cols]``; columns with the same number take the same factor.

        Returns:
            float32 ``[cols]``.
        """
        x = _tied_largest(inputs.largest, ties)
        w = _tied_largest(weight.abs().amax(0), ties)

        def factors(exponent: float) -> torch.Tensor:
            return x**exponent / w ** (1 - exponent)

        if self.exponent is not None:
            return factors(self.exponent)
        step = max(1, weight.numel() // _SEARCHED_WEIGHTS)
        sample, moment = weight[::step].contiguous(), inputs.moment.float()

        def cost(exponent: float) -> float:
            tried = factors(exponent)
            error, stored = rescaled_rounding(sample, tried, moment, fmt)
            grid = float((inputs.largest / tried).max()) / 127
            rounding = grid**2 / 12 * float(stored.square().sum(dtype=torch.float64))
            return error + rounding

        costs = run_all(cost, EXPONENTS)
        return factors(EXPONENTS[costs.index(min(costs))])

    def quantize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> QuantizedRows:
        """Rounds a whole matrix to nearest; the mean square of a column's inputs weighs its errors.

        Args:
            weight: float32 ``[rows, cols]``, already multiplied by the factors.
            moment: float64 ``[cols, cols]``; only its diagonal is used.
            fmt: the integer format to store.
            name: the weight's name, for messages.
            threads: number of threads; by default one per processor, four at most.

        Raises:
            QuantizationError: the format cannot hold the weight; the message names weight and row.
        """
        rows, cols = weight.shape
        label = name or "weight"
        fmt.check(label, rows, cols)
        squares = moment.diagonal().float().reshape(fmt.groups(cols), 1, -1)

        def cost(error: torch.Tensor) -> torch.Tensor:
            return (error.square() * squares).sum(-1)

        return search_scales(weight, cost, fmt, label, threads)


def _tied_largest(largest: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Returns each column's largest value over itself and the columns tied to it."""
    found = torch.zeros(int(ties.max()) + 1)
    found.scatter_reduce_(0, ties, largest, "amax")
    return found[ties].clamp_min(_SMALLEST)
