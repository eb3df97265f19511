"""AWQ (Lin et al. 2023, arXiv 2306.00978): columns that see large inputs are rounded more finely.

A group's columns share a scale, so a column that is multiplied before rounding, and whose inputs
are divided, has a smaller share of the group's error. The factors are a power of the inputs'
magnitude, ``magnitude ** alpha``; the exponent is searched on the output's error. Then the scale of
every group is searched likewise (the paper's clipping): the error that counts is
``e^T H e`` with the group's block ``H`` of the inputs' second moment, not ``e^T e``.

The magnitude is the root of the mean square, which the second moment holds; the paper takes the
mean of the absolute values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.kernels.threads import run_all
from quant.quantizers.input_statistics import InputStatistics, check_moment
from quant.quantizers.rtn import QuantizedRows
from quant.quantizers.scale_search import rescaled_rounding, search_scales

EXPONENTS: Final = 20
# Products a search may cost: fewer rows stand for all of a wide matrix.
SEARCH_PRODUCTS: Final = 1 << 33


@dataclass(frozen=True)
class Awq:
    """The quantizer ``awq``.

    Attributes:
        name: as in `quant.quantizers.registry`.
    """

    name: str = "awq"

    def column_factors(
        self, weight: torch.Tensor, inputs: InputStatistics, fmt: IntFormat, ties: torch.Tensor
    ) -> torch.Tensor:
        """The factor of every column of a weight.

        Args:
            weight: float32 ``[rows, cols]``.
            inputs: of which only the second moment is looked at.
            fmt: what will be stored.
            ties: int64 ``[cols]``; columns of one number take one factor.

        Returns:
            float32 ``[cols]``, all ones where no exponent is better than none.
        """
        rows, cols = weight.shape
        wanted = max(64, SEARCH_PRODUCTS // cols**2)
        sample = weight[:: max(1, rows // wanted)].contiguous()
        magnitude = _tied_magnitude(inputs.moment, ties)
        wide = inputs.moment.float()

        def attempt(step: int) -> tuple[float, torch.Tensor]:
            factors = magnitude ** (step / EXPONENTS)
            factors = factors / (factors.max() * factors.min()).sqrt()
            return rescaled_rounding(sample, factors, wide, fmt)[0], factors

        # The first of the least, and so the plainest.
        return min(run_all(attempt, range(EXPONENTS)), key=lambda outcome: outcome[0])[1]

    def quantize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> QuantizedRows:
        """Quantize a whole matrix by the scale of every group that costs its output least.

        Args:
            weight: float32 ``[rows, cols]``.
            moment: float64 ``[cols, cols]``, the mean of ``x x^T`` over the inputs.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            threads: How many to use; by default one per processor, four at most.

        Raises:
            QuantizationError: A weight that is NaN, infinite or too large, a shape that does not
                suit the format, or a moment of another width.
        """
        rows, cols = weight.shape
        label = name or "weight"
        fmt.check(label, rows, cols)
        check_moment(moment, cols, label)
        size = fmt.columns_per_group(cols)
        blocks = torch.stack(
            [moment[at : at + size, at : at + size].float() for at in range(0, cols, size)]
        )

        def cost(error: torch.Tensor) -> torch.Tensor:
            return (torch.bmm(error, blocks) * error).sum(-1)

        return search_scales(weight, cost, fmt, label, threads)


def _tied_magnitude(moment: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Root of the mean square of every column, over the columns that are tied to it."""
    count = int(ties.max()) + 1
    squares = torch.zeros(count, dtype=torch.float64).index_add_(0, ties, moment.diagonal())
    members = torch.bincount(ties, minlength=count).clamp_min(1)
    return (squares / members).sqrt()[ties].clamp_min(1e-4).float()
