"""The refusal of weights that are no finite numbers: every format is refused them alike."""

from __future__ import annotations

import torch

from quant.errors import QuantizationError


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
