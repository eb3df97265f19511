"""Searches the scale of every group that adds the least error to a matrix's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.formats.packing import dequantize, pack_codes, unpack_codes
from quant.kernels.threads import run_all
from quant.quantizers.row_checks import LARGEST_STORED, SMALLEST_SCALE
from quant.quantizers.rtn import RTN, QuantizedRows

# The search tries these multiples of the scale of least unweighted error for every group.
_RATIOS: Final = tuple(0.70 + 0.03 * step for step in range(16))


CHUNK_WEIGHTS: Final = 1 << 20


def rescaled_rounding(
    weight: torch.Tensor, factors: torch.Tensor, moment: torch.Tensor, fmt: IntFormat
) -> tuple[float, torch.Tensor]:
    """Returns the output error of rounding to nearest a weight whose columns are multiplied first.

    Args:
        weight: float32 ``[rows, cols]``.
        factors: float32 ``[cols]``, the factor of each column.
        moment: float32 ``[cols, cols]``, the inputs' second moment.
        fmt: the integer format to store.

    Returns:
        ``e^T H e`` summed over rows, and the stored values of the multiplied weight, float32
        ``[rows, cols]``.
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
    """Rounds a matrix to nearest, each group by the multiple of its plain scale that costs least.

    Args:
        weight: float32 ``[rows, cols]``.
        cost: returns the cost ``[groups, rows]`` of errors, float32 ``[groups, rows, group size]``.
        fmt: the integer format to store.
        name: the weight's name, for messages.
        threads: number of threads; by default one per processor, four at most.

    Raises:
        QuantizationError: the format cannot hold the weight; the message names weight and row.
    """
    rows, cols = weight.shape
    step = max(1, CHUNK_WEIGHTS // cols)
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
    """`search_scales` for some rows; it keeps the zero points of plain rounding."""
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
