"""Searches scales for the least weighted squared error, where columns do not cost the same."""

from __future__ import annotations

from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.quantizers.row_checks import LARGEST_STORED, SMALLEST_SCALE

# The scales that are tried, in units of the smallest scale that clips nothing. Where a column costs
# much more than the others of its group, its weight decides the scale, so the range is wide.
_TRIED: Final = tuple(1.02 - 0.03 * step for step in range(20))


def weighted_scales(
    weight: torch.Tensor,
    importance: torch.Tensor,
    start: torch.Tensor,
    fmt: IntFormat,
    *,
    signed: bool = False,
) -> torch.Tensor:
    """Returns the scale of each group with the least ``sum(importance * error ** 2)``.

    Args:
        weight: float32 ``[rows, columns]``, finite.
        importance: float32 ``[columns]``, at least 0.
        start: float32 ``[rows, groups]``, a scale that is tried too.
        fmt: a symmetric integer format.
        signed: whether scales below zero are tried too.

    Returns:
        float32 ``[rows, groups]``, exact in bfloat16.

    >>> from quant.formats.formats import parse_format
    >>> row = torch.tensor([[1.0] + [0.1] * 31])
    >>> costs = torch.tensor([0.0] + [1.0] * 31)
    >>> start = torch.tensor([[0.1428]])
    >>> bool(weighted_scales(row, costs, start, parse_format("int4-g32")) < 0.1)
    True
    """
    groups = start.shape[1]
    values = weight.reshape(len(weight), groups, -1)
    costs = importance.reshape(groups, -1)
    above, below = values.amax(-1).clamp_min(0.0), (-values).amax(-1).clamp_min(0.0)
    high, low = fmt.max_code - fmt.implicit_zero_point, -fmt.implicit_zero_point
    best = _cost(values, costs, start, low, high)
    chosen = start
    # A positive scale has one step more below zero, a negative one above.
    for sign in (1.0, -1.0) if signed else (1.0,):
        most = (above, below) if sign > 0 else (below, above)
        plain = torch.maximum(most[0] / high, most[1] / -low)
        for ratio in _TRIED:
            tried = (plain * ratio).clamp_(SMALLEST_SCALE, LARGEST_STORED).mul_(sign)
            tried = tried.to(torch.bfloat16).float()
            cost = _cost(values, costs, tried, low, high)
            better = cost < best
            best = torch.where(better, cost, best)
            chosen = torch.where(better, tried, chosen)
    return chosen


def _cost(
    values: torch.Tensor, costs: torch.Tensor, scale: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """Returns each group's weighted squared error, float32 ``[rows, groups]``."""
    step = scale.unsqueeze(-1)
    error = torch.div(values, step).round_().clamp_(low, high).mul_(step).sub_(values)
    return error.square_().mul_(costs).sum(-1)
