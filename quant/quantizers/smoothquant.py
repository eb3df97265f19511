"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): activations' outliers are moved into weights.

Where activations are rounded too, a column of them that is much larger than the others widens every
other's steps, while weights are even. So column ``j`` of the activations is divided by ``s_j =
max|X_j| ** a / max|W_j| ** (1 - a)``, and the weight's is multiplied by it; at ``a = 0.5``, the
paper's value, both then have the same largest number in each column. What is multiplied is rounded
to nearest, by the scales of least error weighted by what enters each column: the plain error would
clip just those weights that took on an outlier.
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
# Columns that are never larger than this are as good as absent: no factor is made of them.
_SMALLEST: Final = 1e-5
_SEARCHED_WEIGHTS: Final = 1 << 20


@dataclass(frozen=True)
class SmoothQuant:
    """The quantizers ``smoothquant`` and ``smoothquant-search``.

    Attributes:
        name: as in `quant.quantizers.registry`.
        exponent: ``a``, the share of the difficulty that weights take; None to search for it,
            weight by weight.
    """

    name: str = "smoothquant"
    exponent: float | None = EXPONENT

    def column_factors(
        self, weight: torch.Tensor, inputs: InputStatistics, fmt: IntFormat, ties: torch.Tensor
    ) -> torch.Tensor:
        """The factor of every column of a weight; its inputs are divided by them.

        The search takes the exponent of the least expected error of the output: the stored weight's
        own, ``e^T H e``, and that of inputs rounded by one scale for all of them, whose error is
        even over a step.

        Args:
            weight: float32 ``[rows, cols]``.
            inputs: what calibration knows of the inputs.
            fmt: what will be stored.
            ties: int64 ``[cols]``; columns of one number take one factor.

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
        """Rounds a whole matrix to nearest, errors weighted by the mean square of their inputs.

        Args:
            weight: float32 ``[rows, cols]``, multiplied by the factors.
            moment: float64 ``[cols, cols]``, of which only the diagonal is looked at.
            fmt: what to store.
            name: the weight's name, for messages.
            threads: how many to use; by default one per processor, four at most.

        Raises:
            QuantizationError: a weight that the format cannot hold, by name and row.
        """
        rows, cols = weight.shape
        label = name or "weight"
        fmt.check(label, rows, cols)
        squares = moment.diagonal().float().reshape(fmt.groups(cols), 1, -1)

        def cost(error: torch.Tensor) -> torch.Tensor:
            return (error.square() * squares).sum(-1)

        return search_scales(weight, cost, fmt, label, threads)


def _tied_largest(largest: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Each column's largest value, over the columns that are tied to it."""
    found = torch.zeros(int(ties.max()) + 1)
    found.scatter_reduce_(0, ties, largest, "amax")
    return found[ties].clamp_min(_SMALLEST)
