"""What rows of a weight may hold: finite numbers, and groups whose scale every target stores."""

from __future__ import annotations

from typing import Final

import torch

from quant.errors import QuantizationError
from quant.formats.formats import IntFormat

# The smallest scale is 2**-17 and the largest 65280: bfloat16 values that are exact in float16 too
# (the small end as subnormals), so that every target stores the same scale.
MIN_SCALE_BITS: Final = 0x3700
MAX_SCALE_BITS: Final = 0x477F
SMALLEST_SCALE: Final = 2.0**-17
LARGEST_STORED: Final = 65280.0
# Groups whose plain scale is beyond float16 are refused.
LARGEST_SCALE: Final = 65504.0


def check_rows(weight: torch.Tensor, fmt: IntFormat, name: str = "", first_row: int = 0) -> None:
    """Refuses rows that no quantizer of this project stores in a format.

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
    """How far each group goes above zero, below it, and what its scales are in units of."""
    positive = groups.amax(1).clamp_min(0.0)
    negative = (-groups).amax(1).clamp_min(0.0)
    reach = torch.maximum(positive, negative) if fmt.symmetric else positive + negative
    return positive, negative, reach


def first_bad_row(values: torch.Tensor, reach: torch.Tensor, fmt: IntFormat) -> int | None:
    """The first row that is not finite, or too large for a scale."""
    limit = LARGEST_SCALE * (fmt.max_code // 2 if fmt.symmetric else fmt.max_code)
    fine = (reach <= limit).reshape(len(values), -1).all(1) & torch.isfinite(values).all(1)
    return None if bool(fine.all()) else int((~fine).nonzero()[0])


def matrix_size(weight: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a matrix.

    Raises:
        QuantizationError: It is no matrix, or of a dtype that no quantizer reads.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuantizationError(
            "a weight to quantize is float32, float16 or bfloat16 [rows, cols], not "
            f"{weight.dtype} {list(weight.shape)}"
        )
    return weight.shape[0], weight.shape[1]


def refusal(row: torch.Tensor, fmt: IntFormat, label: str, number: int) -> QuantizationError:
    """The error that says why a row, number ``number`` of the whole weight, has no scale."""
    values = row.to(torch.float32)
    return damage(values, label, number, "quantized") or QuantizationError(
        f"{label} has values up to {float(values.abs().max()):.3g} in row {number}; a scale of "
        f"{fmt.name} would exceed {LARGEST_SCALE:g}, the largest float16: keep it fp32"
    )


def damage(values: torch.Tensor, name: str, row: int, what: str) -> QuantizationError | None:
    """The error that names a row's NaN or infinite value; None when all values are finite.

    Args:
        values: float32 ``[columns]``, the row.
        name: of the weight, for the message.
        row: its number in the whole weight, for the message.
        what: what only finite weights can be: ``stored`` or ``quantized``.
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
