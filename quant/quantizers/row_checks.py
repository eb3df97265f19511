"""Checks the rows of a weight: finite values, and groups whose scale every target can store."""

from __future__ import annotations

from typing import Final

import torch

from quant.errors import FormatRefused, QuantizationError
from quant.formats.formats import IntFormat

# The smallest scale is 2**-17 and the largest 65280. bfloat16 values in this range are exact in
# float16 too (small ones as subnormals), so that every target stores the same scale.
MIN_SCALE_BITS: Final = 0x3700
MAX_SCALE_BITS: Final = 0x477F
SMALLEST_SCALE: Final = 2.0**-17
LARGEST_STORED: Final = 65280.0
# The largest float16: groups whose plain scale exceeds it are refused.
LARGEST_SCALE: Final = 65504.0


def check_rows(weight: torch.Tensor, fmt: IntFormat, name: str = "", first_row: int = 0) -> None:
    """Refuses rows that no quantizer here can store in a format.

    Raises:
        QuantizationError: As in ``RoundToNearest.quantize_rows``.
    """
    rows, cols = matrix_size(weight)
    fmt.check(name or "weight", rows, cols)
    values = weight.to(torch.float32)
    reach = reach_of(values.reshape(-1, fmt.columns_per_group(cols)), fmt)[2]
    bad_row = first_bad_row(values, reach, fmt)
    if bad_row is not None:
        raise refusal(weight[bad_row], fmt, name or "weight", first_row + bad_row)


def reach_of(
    groups: torch.Tensor, fmt: IntFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns each group's largest value, its largest negated value and its reach.

    The first two are at least 0. The reach is the unit of the interval of scales to search, see
    `quant.kernels.native.interval`. All are float32 ``[groups]``.
    """
    positive = groups.amax(1).clamp_min(0.0)
    negative = (-groups).amax(1).clamp_min(0.0)
    reach = torch.maximum(positive, negative) if fmt.symmetric else positive + negative
    return positive, negative, reach


def first_bad_row(values: torch.Tensor, reach: torch.Tensor, fmt: IntFormat) -> int | None:
    """Returns the index of the first row with a value that is not finite or a scale too large.

    Args:
        values: float32 ``[rows, columns]``.
        reach: float32 ``[rows * groups]``, as `reach_of` returns it.
        fmt: the integer format.

    Returns:
        The row's index; None when all rows can be quantized.
    """
    limit = LARGEST_SCALE * (fmt.max_code // 2 if fmt.symmetric else fmt.max_code)
    fine = (reach <= limit).reshape(len(values), -1).all(1) & torch.isfinite(values).all(1)
    return None if bool(fine.all()) else int((~fine).nonzero()[0])


def matrix_size(weight: torch.Tensor) -> tuple[int, int]:
    """Returns the rows and columns of a weight.

    Raises:
        QuantizationError: The weight is not a matrix, or no quantizer reads its dtype.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuantizationError(
            "a weight to quantize must be float32, float16 or bfloat16 [rows, cols], not "
            f"{weight.dtype} {list(weight.shape)}"
        )
    return weight.shape[0], weight.shape[1]


def refusal(row: torch.Tensor, fmt: IntFormat, label: str, number: int) -> QuantizationError:
    """Returns the error that says why the row with index ``number`` cannot be quantized."""
    values = row.to(torch.float32)
    return damage(values, label, number, "quantized") or FormatRefused(
        f"{label} has values up to {float(values.abs().max()):.3g} in row {number}; a scale of "
        f"{fmt.name} would exceed {LARGEST_SCALE:g}, the largest float16",
        "keep it fp32",
    )


def damage(values: torch.Tensor, name: str, row: int, what: str) -> QuantizationError | None:
    """Returns the error that names a row's NaN or infinite value; None when all are finite.

    Args:
        values: float32 ``[columns]``, the row's values.
        name: the weight's name, for the message.
        row: the row's index in the whole weight, for the message.
        what: what the caller does with the weight, for the message: ``stored`` or ``quantized``.
    """
    if bool(values.isnan().any()):
        problem = "NaN"
    elif bool(values.isinf().any()):
        problem = "an infinite value"
    else:
        return None
    return QuantizationError(
        f"{name} has {problem} in row {row}; only finite weights can be {what}: the checkpoint is "
        f"damaged or overflowed when it was saved"
    )
