"""Round to nearest, with the best representable scale of every group.

For each group of weights ``w`` the quantizer minimizes ``sum((w - scale * q) ** 2)`` over the
bfloat16 numbers, where ``q = clamp(round_half_even(w / scale))``, and over the zero points when the
format is asymmetric. Every row is quantized on its own, so callers may cut a matrix into chunks of
rows and give each to a thread.

The same arithmetic, operation for operation in float32, exists twice: in
``quant/kernels/_kernels.c`` and here in torch for machines without a compiler. Both give the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from quant.errors import QuantizationError
from quant.formats.formats import IntFormat
from quant.formats.packing import pack_codes
from quant.kernels import native
from quant.quantizers.damaged_rows import damage

Backend = Literal["native", "torch"]
Buffer = torch.Tensor | npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# The smallest scale is 2**-17 and the largest 65280: bfloat16 values that are exact in float16 too
# (the small end as subnormals), so that every target stores the same scale.
MIN_SCALE_BITS: Final = 0x3700
MAX_SCALE_BITS: Final = 0x477F
SMALLEST_SCALE: Final = 2.0**-17
LARGEST_STORED: Final = 65280.0
# Groups whose plain scale is beyond float16 are refused.
LARGEST_SCALE: Final = 65504.0

_CANDIDATES: Final = 16  # scales that are tried together
_SUM_COLUMNS: Final = 128  # columns that are summed before they join the total
_LANES: Final = 16  # partial sums of a row's squared error
_SURE: Final = 1.001  # margin of a lower bound over the best error: rounding cannot matter
_WORK_ELEMENTS: Final = 1 << 20


@dataclass(frozen=True)
class RowErrors:
    """What quantizing some rows cost.

    Attributes:
        squared_error: Sum of ``(weight - stored value) ** 2``.
        squared_norm: Sum of ``weight ** 2``.
    """

    squared_error: float
    squared_norm: float


@dataclass(frozen=True)
class QuantizedRows:
    """The stored parts of some rows, and what quantizing them cost.

    Attributes:
        codes: uint8 ``[rows, cols * bits / 8]``.
        scale: bfloat16 ``[rows, groups]``.
        zero_point: uint8 ``[rows, ceil(groups * bits / 8)]``, or None when symmetric.
        squared_error: Sum of ``(weight - stored value) ** 2``.
        squared_norm: Sum of ``weight ** 2``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    squared_error: float
    squared_norm: float

    @classmethod
    def joined(cls, parts: Sequence[QuantizedRows]) -> QuantizedRows:
        """Parts of one matrix, in the order of its rows."""
        points = [part.zero_point for part in parts if part.zero_point is not None]
        return cls(
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero_point=torch.cat(points) if points else None,
            squared_error=sum(part.squared_error for part in parts),
            squared_norm=sum(part.squared_norm for part in parts),
        )


class RoundToNearest:
    """The quantizer ``rtn``: no calibration data, one pass over the weights."""

    name: Final = "rtn"

    def quantize_rows(
        self,
        weight: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        first_row: int = 0,
        backend: Backend | None = None,
    ) -> QuantizedRows:
        """Quantize rows of a weight matrix.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            first_row: Number of the first of these rows in the whole weight, for messages.
            backend: ``native`` or ``torch`` to insist on one implementation (they agree bit for
                bit); None takes the native one where it was built.

        Raises:
            QuantizationError: When the shape does not suit the format, or a weight is NaN,
                infinite, or so large that its scale would not be finite in float16.
        """
        rows, cols = _shape(weight)
        fmt.check(name or "weight", rows, cols)
        parts = {
            part: torch.empty(layout.shape, dtype=getattr(torch, layout.dtype))
            for part, layout in fmt.layout(rows, cols).items()
        }
        codes, scale, zero_point = parts["codes"], parts["scale"], parts.get("zero_point")
        cost = self.quantize_rows_into(
            weight, fmt, codes, scale, zero_point, name=name, first_row=first_row, backend=backend
        )
        return QuantizedRows(codes, scale, zero_point, cost.squared_error, cost.squared_norm)

    def quantize_rows_into(
        self,
        weight: torch.Tensor,
        fmt: IntFormat,
        codes: Buffer,
        scale: Buffer,
        zero_point: Buffer | None = None,
        *,
        name: str = "",
        first_row: int = 0,
        backend: Backend | None = None,
    ) -> RowErrors:
        """Quantize rows into buffers that the caller holds, such as views of a larger chunk.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The integer format to store.
            codes: Contiguous uint8 ``[rows, cols * bits / 8]``, torch or numpy.
            scale: Contiguous ``[rows, groups]``, torch bfloat16, or uint16 of either kind, which
                then receives the bfloat16 bits.
            zero_point: Contiguous uint8 ``[rows, ceil(groups * bits / 8)]``; None when symmetric.
            name: The weight's name, for messages.
            first_row: Number of the first of these rows in the whole weight, for messages.
            backend: As in ``quantize_rows``.

        Raises:
            QuantizationError: As in ``quantize_rows``, and when a buffer does not fit.
        """
        rows, cols = _shape(weight)
        label = name or "weight"
        fmt.check(label, rows, cols)
        layout = fmt.layout(rows, cols)
        code_part = _buffer(codes, "codes", layout["codes"].shape, torch.uint8)
        scale_part = _buffer(scale, "scale", layout["scale"].shape, torch.bfloat16)
        zero_part = None
        if not fmt.symmetric:
            if zero_point is None:
                raise QuantizationError(f"{label}: {fmt.name} needs a zero_point buffer")
            zero_part = _buffer(zero_point, "zero_point", layout["zero_point"].shape, torch.uint8)
        weight = weight.detach().contiguous()
        if backend is None:
            backend = "native" if native.available() else "torch"
        if backend == "native":
            outcome = native.quantize_rows(weight, fmt, code_part, scale_part, zero_part)
        else:
            outcome = _quantize_rows_torch(weight, fmt, code_part, scale_part, zero_part)
        if outcome.bad_row is not None:
            raise _bad_row(weight[outcome.bad_row], fmt, label, first_row + outcome.bad_row)
        return RowErrors(outcome.squared_error, outcome.squared_norm)


RTN: Final = RoundToNearest()


def check_rows(weight: torch.Tensor, fmt: IntFormat, name: str = "", first_row: int = 0) -> None:
    """Refuses rows that no quantizer of this project stores in a format.

    Raises:
        QuantizationError: As in ``RoundToNearest.quantize_rows``.
    """
    rows, cols = _shape(weight)
    fmt.check(name or "weight", rows, cols)
    values = weight.to(torch.float32)
    reach = _reach(values.reshape(-1, fmt.columns_per_group(cols)), fmt)[2]
    bad_row = _bad_row_of(values, reach, fmt)
    if bad_row is not None:
        raise _bad_row(weight[bad_row], fmt, name or "weight", first_row + bad_row)


def _reach(groups: torch.Tensor, fmt: IntFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far each group goes above zero, below it, and what its scales are in units of."""
    positive = groups.amax(1).clamp_min(0.0)
    negative = (-groups).amax(1).clamp_min(0.0)
    reach = torch.maximum(positive, negative) if fmt.symmetric else positive + negative
    return positive, negative, reach


def _bad_row_of(values: torch.Tensor, reach: torch.Tensor, fmt: IntFormat) -> int | None:
    """The first row that is not finite, or too large for a scale."""
    limit = LARGEST_SCALE * (fmt.max_code // 2 if fmt.symmetric else fmt.max_code)
    fine = (reach <= limit).reshape(len(values), -1).all(1) & torch.isfinite(values).all(1)
    return None if bool(fine.all()) else int((~fine).nonzero()[0])


def _shape(weight: torch.Tensor) -> tuple[int, int]:
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuantizationError(
            "a weight to quantize is float32, float16 or bfloat16 [rows, cols], not "
            f"{weight.dtype} {list(weight.shape)}"
        )
    return weight.shape[0], weight.shape[1]


def _buffer(buffer: Buffer, part: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = buffer if isinstance(buffer, torch.Tensor) else torch.from_numpy(buffer)
    if dtype == torch.bfloat16 and tensor.dtype == torch.uint16:
        tensor = tensor.view(torch.bfloat16)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise QuantizationError(
            f"the {part} buffer is {layout} {tensor.dtype} {list(tensor.shape)}; "
            f"it must be contiguous {dtype} {list(shape)}"
        )
    return tensor


def _bad_row(row: torch.Tensor, fmt: IntFormat, label: str, number: int) -> QuantizationError:
    values = row.to(torch.float32)
    return damage(values, label, number, "quantized") or QuantizationError(
        f"{label} has values up to {float(values.abs().max()):.3g} in row {number}; a scale of "
        f"{fmt.name} would exceed {LARGEST_SCALE:g}, the largest float16: keep it fp32"
    )


def _quantize_rows_torch(
    weight: torch.Tensor,
    fmt: IntFormat,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> native.Outcome:
    """The torch implementation; the same contract as ``native.quantize_rows``."""
    rows, cols = weight.shape
    values = weight.to(torch.float32)
    size = fmt.columns_per_group(cols)
    grouped = values.reshape(-1, size)
    positive, negative, reach = _reach(grouped, fmt)
    bad_row = _bad_row_of(values, reach, fmt)
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
    """Bits of the best scale, int32 ``[groups]``, and the best zero point, float32 ``[groups]``."""
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
        if best_zero is None:
            zero = torch.tensor(float(fmt.implicit_zero_point))
            error = area * _unit_errors(columns, inverse, -zero, fmt.max_code - zero)
            least, lane = _first_least(error)
            zero_of = None
        else:
            error, zeros = _asymmetric_errors(
                columns, inverse, area, positive[alive], negative[alive], fmt
            )
            least, lane = _first_least(error)
            zero_of = zeros.gather(0, lane.unsqueeze(0)).squeeze(0)
        # Blocks go down the scales: an equal error takes the smaller scale.
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
    fmt: IntFormat,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least error over the zero points of every scale, and the first zero point that has it.

    A zero point between ``last`` (nothing is clipped above) and ``first`` (nothing is clipped
    below) beats those outside. All of them are tried; at 8 bits the two ends and the middle.
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
        error = area * _unit_errors(columns, inverse, -zero, steps - zero)
        better = error < best
        best = torch.where(better, error, best)
        best_zero = torch.where(better, zero, best_zero)
    return best, best_zero


def _unit_errors(
    columns: torch.Tensor,
    inverse: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    """Squared errors in units of the scale, ``[candidates, groups]``, summed in the fixed order.

    Even and odd columns are summed apart over blocks of 128 columns; the blocks are then added.
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
            sums[column % 2].add_(scaled.mul_(scaled))
        total += sums[0] + sums[1]
    return total


def _first_least(error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least value of each column and the first row that has it."""
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
    """A lower bound of the error of every scale up to ``top``: what clipping alone costs."""
    scales = _scale_of(top[alive])
    if not fmt.symmetric:
        # The two excesses add up to what the range is too wide by, however the window lies.
        excess = (positive[alive] + negative[alive] - fmt.max_code * scales).clamp_min(0.0)
        return excess * excess * 0.5
    low = (-fmt.implicit_zero_point * scales).unsqueeze(1)
    high = ((fmt.implicit_zero_point - 1) * scales).unsqueeze(1)
    values = groups[alive]
    excess = values - torch.maximum(torch.minimum(values, high), low)
    return (excess * excess).sum(1)


def _bits_of(value: torch.Tensor) -> torch.Tensor:
    """Bits of the bfloat16 number at or below each positive value, within the allowed range."""
    bits = value.view(torch.int32) >> 16
    return bits.clamp_(MIN_SCALE_BITS, MAX_SCALE_BITS)


def _scale_of(bits: torch.Tensor) -> torch.Tensor:
    return (bits << 16).view(torch.float32)


def _sum_of_squares(values: torch.Tensor) -> float:
    """Sum of squares in float64 in the fixed order.

    In each row, lane ``j`` sums columns ``j, j + 16, ...``; the lanes are added as a tree, and the
    rows one after the other.
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
