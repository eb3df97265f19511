"""AWQ (Lin et al. 2023, arXiv 2306.00978): rounds columns with large inputs more finely.

A group's columns share a scale, so a column that is multiplied before rounding, and whose inputs
are divided, has a smaller share of the group's error. The factors are a power of the inputs'
magnitude, ``magnitude ** alpha``; a search takes the exponent of least output error. A second
search takes the scale of every group (the paper's clipping) that minimizes ``e^T H e``, with the
group's block ``H`` of the inputs' second moment, instead of ``e^T e``.

The magnitude here is the root mean square, which the second moment contains; the paper takes the
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
# Multiplications that one try of the search may take: of a wide matrix it samples fewer rows.
SEARCH_PRODUCTS: Final = 1 << 33


@dataclass(frozen=True)
class Awq:
    """The quantizer ``awq``.

    Attributes:
        name: the name in `quant.quantizers.registry`.
    """

    name: str = "awq"

    def column_factors(
        self, weight: torch.Tensor, inputs: InputStatistics, fmt: IntFormat, ties: torch.Tensor
    ) -> torch.Tensor:
        """Returns the factor of every column of a weight; the inputs are divided by them.

        Args:
            weight: float32 ``[rows, cols]``.
            inputs: the statistics of the inputs; only their second moment is used.
            fmt: the integer format to store.
            ties: int64 ``[cols]``; columns with the same number take the same factor.

        Returns:
            float32 ``[cols]``, all ones where no exponent is better than 0.
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

        # Of equal errors, min takes the first, which has the smallest exponent.
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
        """Quantizes a whole matrix, each group by the scale that adds the least output error.

        Args:
            weight: float32 ``[rows, cols]``.
            moment: float64 ``[cols, cols]``, the mean of ``x x^T`` over the inputs.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            threads: Number of threads; by default one per processor, four at most.

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
    """Returns the root mean square of every column's inputs, over itself and the tied columns."""
    count = int(ties.max()) + 1
    squares = torch.zeros(count, dtype=torch.float64).index_add_(0, ties, moment.diagonal())
    members = torch.bincount(ties, minlength=count).clamp_min(1)
    return (squares / members).sqrt()[ties].clamp_min(1e-4).float()
