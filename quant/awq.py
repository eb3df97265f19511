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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from quant.formats import IntFormat
from quant.packing import dequantize, pack_codes, unpack_codes
from quant.rtn import LARGEST_STORED, RTN, SMALLEST_SCALE, QuantizedRows
from quant.second_moment import InputStatistics, check_moment
from quant.threads import run_all

EXPONENTS: Final = 20
# Multiples of the scale of least plain error that are tried for every group.
_RATIOS: Final = tuple(0.70 + 0.03 * step for step in range(16))
# Products a search may cost: fewer rows stand for all of a wide matrix.
_SEARCH_PRODUCTS: Final = 1 << 33
_CHUNK_WEIGHTS: Final = 1 << 20


@dataclass(frozen=True)
class Awq:
    """The quantizer ``awq``.

    Attributes:
        name: as in `quant.registry`.
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
        wanted = max(64, _SEARCH_PRODUCTS // cols**2)
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


def rescaled_rounding(
    weight: torch.Tensor, factors: torch.Tensor, moment: torch.Tensor, fmt: IntFormat
) -> tuple[float, torch.Tensor]:
    """What rounding a weight to nearest costs its output when its columns are multiplied first.

    Args:
        weight: float32 ``[rows, cols]``.
        factors: float32 ``[cols]``.
        moment: float32 ``[cols, cols]``, the inputs' second moment.
        fmt: what to store.

    Returns:
        ``e^T H e`` summed over rows, and the stored values of the multiplied weight.
    """
    made = RTN.quantize_rows(weight * factors, fmt)
    stored = dequantize(made.codes, made.scale, made.zero_point, fmt)
    error = stored / factors - weight
    return float(((error @ moment) * error).sum(dtype=torch.float64)), stored


def search_scales(
    weight: torch.Tensor,
    cost: Callable[[torch.Tensor], torch.Tensor],
    fmt: IntFormat,
    name: str,
    threads: int | None = None,
) -> QuantizedRows:
    """Rounds a matrix to nearest by those multiples of the plain scales that cost least.

    Args:
        weight: float32 ``[rows, cols]``.
        cost: of errors, float32 ``[groups, rows, group size]``, by group and row.
        fmt: what to store.
        name: the weight's name, for messages.
        threads: how many to use; by default one per processor, four at most.

    Raises:
        QuantizationError: a weight that the format cannot hold, by name and row.
    """
    rows, cols = weight.shape
    step = max(1, _CHUNK_WEIGHTS // cols)
    parts = run_all(
        lambda at: _search_rows(weight[at : at + step], cost, fmt, name, at),
        range(0, rows, step),
        threads,
    )
    return QuantizedRows.joined(parts)


def _search_rows(
    weight: torch.Tensor,
    cost: Callable[[torch.Tensor], torch.Tensor],
    fmt: IntFormat,
    name: str,
    first_row: int,
) -> QuantizedRows:
    """The same of some rows; zero points stay as they are."""
    rows, cols = weight.shape
    groups = fmt.groups(cols)
    plain = RTN.quantize_rows(weight, fmt, name=name, first_row=first_row)
    values = weight.reshape(rows, groups, -1).transpose(0, 1)  # [groups, rows, size]
    zero = torch.full((rows, groups), float(fmt.implicit_zero_point))
    if plain.zero_point is not None:
        zero = unpack_codes(plain.zero_point, fmt, groups).float()
    zero = zero.t().unsqueeze(-1)
    base = plain.scale.float().t().unsqueeze(-1)  # [groups, rows, 1]
    best = torch.full((groups, rows), float("inf"))
    scale = base.clone()
    for ratio in (1.0, *_RATIOS):
        tried = (base * ratio).to(torch.bfloat16).float().clamp(SMALLEST_SCALE, LARGEST_STORED)
        error = _steps(values, tried, zero, fmt).mul_(tried).sub_(values)
        loss = cost(error)
        better = loss < best
        best = torch.where(better, loss, best)
        scale = torch.where(better.unsqueeze(-1), tried, scale)
    steps = _steps(values, scale, zero, fmt)
    residual = steps * scale - values
    codes = (steps + zero).to(torch.uint8).transpose(0, 1).reshape(rows, cols)
    return QuantizedRows(
        codes=pack_codes(codes, fmt),
        scale=scale.squeeze(-1).t().to(torch.bfloat16).contiguous(),
        zero_point=plain.zero_point,
        squared_error=float(residual.square().sum(dtype=torch.float64)),
        squared_norm=plain.squared_norm,
    )


def _steps(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, fmt: IntFormat
) -> torch.Tensor:
    steps = torch.div(values, scale).round_()
    return torch.maximum(torch.minimum(steps, fmt.max_code - zero), -zero)
