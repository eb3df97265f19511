"""Round to nearest in torch, for machines without a compiler; see `quant.quantizers.rtn`.

``quant/kernels/_kernels.c`` does the same float32 operations and gives the same bits, so every sum
here has a fixed order.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from quant.formats.formats import IntFormat
from quant.formats.packing import pack_codes
from quant.kernels import native
from quant.quantizers.row_checks import MAX_SCALE_BITS, MIN_SCALE_BITS, first_bad_row, reach_of

_CANDIDATES: Final = 16  # scales that are tried together
_SUM_COLUMNS: Final = 128  # columns in a partial sum of the error
_LANES: Final = 16  # partial sums of a row's squared error
_SURE: Final = 1.001  # margin of a lower bound over the best error, wider than rounding errors
_WORK_ELEMENTS: Final = 1 << 20


def quantize_rows(
    weight: torch.Tensor,
    fmt: IntFormat,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> native.Outcome:
    """Quantizes rows into buffers, with the arguments of `quant.kernels.native.quantize_rows`.

    Like that function it reports a row that cannot be quantized in its result, and raises nothing.
    """
    rows, cols = weight.shape
    values = weight.to(torch.float32)
    size = fmt.columns_per_group(cols)
    grouped = values.reshape(-1, size)
    positive, negative, reach = reach_of(grouped, fmt)
    bad_row = first_bad_row(values, reach, fmt)
    if bad_row is not None:
        return native.Outcome(0.0, 0.0, bad_row)

    bits = torch.empty(len(grouped), dtype=torch.int32)
    zero = torch.full((len(grouped),), float(fmt.implicit_zero_point))
    step = max(1, _WORK_ELEMENTS // (size * _CANDIDATES))
    for start in range(0, len(grouped), step):
        part = slice(start, start + step)
        bits[part], found = _search(grouped[part], positive[part], negative[part], reach[part], fmt)
        if found is not None:
            zero[part] = found

    scales = _scale_of(bits).unsqueeze(1)
    zeros = zero.unsqueeze(1)
    low, high = -zeros, fmt.max_code - zeros
    steps = torch.maximum(torch.minimum(grouped * (1.0 / scales), high), low).round_()
    residual = (grouped - steps * scales).reshape(rows, cols)
    unpacked = (steps + zeros).to(torch.uint8).reshape(rows, cols)
    codes.copy_(pack_codes(unpacked, fmt))
    scale.copy_(scales.to(torch.bfloat16).reshape(rows, -1))
    if zero_point is not None:
        zero_point.copy_(pack_codes(zero.to(torch.uint8).reshape(rows, -1), fmt))
    return native.Outcome(_sum_of_squares(residual), _sum_of_squares(values), None)


def _search(
    groups: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    reach: torch.Tensor,
    fmt: IntFormat,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the bits of the best scales, int32 ``[groups]``, and the best zero points.

    The zero points are float32 ``[groups]``, or None for a symmetric format. The search tries
    blocks of scales from the largest down, and a group leaves it when clipping alone costs more
    than its best error.
    """
    count, size = groups.shape
    low_factor, high_factor = native.interval(fmt, size)
    first = _bits_of(reach * low_factor)
    last = _bits_of(reach * high_factor)
    best_error = torch.full((count,), float("inf"))
    best_bits = last.clone()
    best_zero = None if fmt.symmetric else torch.zeros(count)
    alive = torch.arange(count)
    top = last.clone()
    lanes = torch.arange(_CANDIDATES, dtype=torch.int32).unsqueeze(1)
    while len(alive):
        columns = groups[alive].t().contiguous()
        bits = torch.maximum(top[alive] - (_CANDIDATES - 1) + lanes, first[alive])
        scales = _scale_of(bits)
        inverse = 1.0 / scales
        area = scales * scales
        offset = _offset(positive[alive], negative[alive], fmt)
        if best_zero is None:
            zero = torch.tensor(float(fmt.implicit_zero_point))
            low, high = -zero, fmt.max_code - zero
            error = area * _unit_errors(columns, inverse, low, high, offset)
            least, lane = _first_least(error)
            zero_of = None
        else:
            error, zeros = _asymmetric_errors(
                columns, inverse, area, positive[alive], negative[alive], offset, fmt
            )
            least, lane = _first_least(error)
            zero_of = zeros.gather(0, lane.unsqueeze(0)).squeeze(0)
        # Blocks come in the order of falling scales, so `<=` takes the smaller of equal scales.
        better = least <= best_error[alive]
        chosen = alive[better]
        best_error[chosen] = least[better]
        best_bits[chosen] = bits.gather(0, lane.unsqueeze(0)).squeeze(0)[better]
        if best_zero is not None and zero_of is not None:
            best_zero[chosen] = zero_of[better]
        top[alive] -= _CANDIDATES
        alive = alive[top[alive] >= first[alive]]
        if len(alive):
            bound = _clipping_bound(groups, positive, negative, top, alive, fmt)
            alive = alive[bound <= best_error[alive] * _SURE]
    return best_bits, best_zero


def _asymmetric_errors(
    columns: torch.Tensor,
    inverse: torch.Tensor,
    area: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    offset: torch.Tensor | None,
    fmt: IntFormat,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the least error over every scale's zero points, and the first zero point that has it.

    Zero points between ``last``, the largest that clips nothing above, and ``first``, the smallest
    that clips nothing below, beat all others. The search tries each of them below 8 bits, and the
    two ends and the middle at 8 bits.
    """
    steps = float(fmt.max_code)
    first = torch.round(negative * inverse).clamp(0.0, steps)
    last = (steps - torch.round(positive * inverse)).clamp(0.0, steps)
    last = torch.minimum(first, last)
    spread = first - last
    widest = int(spread.max())
    trials = widest + 1 if fmt.bits < 8 else min(2 * widest, 2) + 1
    best = torch.full_like(inverse, float("inf"))
    best_zero = torch.zeros_like(inverse)
    for trial in range(trials):
        if fmt.bits < 8:
            zero = torch.minimum(last + float(trial), first)
        else:
            zero = last + torch.floor(spread * (0.5 * trial))
        error = area * _unit_errors(columns, inverse, -zero, steps - zero, offset)
        better = error < best
        best = torch.where(better, error, best)
        best_zero = torch.where(better, zero, best_zero)
    return best, best_zero


def _unit_errors(
    columns: torch.Tensor,
    inverse: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    """Returns squared errors in units of the scale, ``[candidates, groups]``.

    Where there are offsets, ``[groups]``, each square is multiplied by the weight's magnitude plus
    its group's offset.

    The order of summation is fixed: even and odd columns are summed separately over blocks of 128
    columns, and then the blocks are added.
    """
    size = len(columns)
    total = torch.zeros_like(inverse)
    scaled, nearest = torch.empty_like(inverse), torch.empty_like(inverse)
    for start in range(0, size, _SUM_COLUMNS):
        sums = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for column in range(start, min(start + _SUM_COLUMNS, size)):
            torch.mul(columns[column], inverse, out=scaled)
            torch.minimum(scaled, high, out=nearest)
            torch.maximum(nearest, low, out=nearest)
            scaled.sub_(nearest.round_())
            scaled.mul_(scaled)
            if offset is not None:
                scaled.mul_(columns[column].abs() + offset)
            sums[column % 2].add_(scaled)
        total += sums[0] + sums[1]
    return total


def _first_least(error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the least value of each column and the first row that has it."""
    least = error.amin(0)
    return least, (error == least).to(torch.uint8).argmax(0)


def _clipping_bound(
    groups: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    top: torch.Tensor,
    alive: torch.Tensor,
    fmt: IntFormat,
) -> torch.Tensor:
    """Returns a lower bound of the error of every scale up to ``top``: the error of clipping."""
    scales = _scale_of(top[alive])
    offset = _offset(positive[alive], negative[alive], fmt)
    if not fmt.symmetric:
        # With any zero point, the lengths clipped at both ends add up to at least this excess, so
        # the errors of the two outermost values cost at least half its square.
        excess = (positive[alive] + negative[alive] - fmt.max_code * scales).clamp_min(0.0)
        if offset is None:
            return excess * excess * 0.5
        # Errors a and b at ends of importance p and n cost a^2 p + b^2 n.
        above, below = positive[alive] + offset, negative[alive] + offset
        return excess * excess * above * below / (above + below).clamp_min(1e-38)
    low = (-fmt.implicit_zero_point * scales).unsqueeze(1)
    high = ((fmt.implicit_zero_point - 1) * scales).unsqueeze(1)
    values = groups[alive]
    excess = values - torch.maximum(torch.minimum(values, high), low)
    squares = excess * excess
    if offset is not None:
        squares *= values.abs() + offset.unsqueeze(1)
    return squares.sum(1)


def _offset(positive: torch.Tensor, negative: torch.Tensor, fmt: IntFormat) -> torch.Tensor | None:
    """Returns what each group adds to the magnitudes of its weights; None where nothing counts."""
    if not native.is_weighted(fmt):
        return None
    return native.OFFSET * torch.maximum(positive, negative)


def _bits_of(value: torch.Tensor) -> torch.Tensor:
    """Returns the bits of the bfloat16 number at or below each positive value, clamped to range."""
    bits = value.view(torch.int32) >> 16
    return bits.clamp_(MIN_SCALE_BITS, MAX_SCALE_BITS)


def _scale_of(bits: torch.Tensor) -> torch.Tensor:
    return (bits << 16).view(torch.float32)


def _sum_of_squares(values: torch.Tensor) -> float:
    """Returns the sum of squares in float64, added in a fixed order.

    In each row, lane ``j`` sums columns ``j, j + 16, ...``; a tree adds the lanes, and then the
    rows are added one after the other.
    """
    rows, cols = values.shape
    lanes = np.zeros((rows, _LANES))
    wide = values.numpy()
    for start in range(0, cols, _LANES):
        block = wide[:, start : start + _LANES].astype(np.float64)
        lanes[:, : block.shape[1]] += block * block
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return float(np.add.accumulate(lanes[:, 0])[-1])
