"""The error for weights with NaN or infinite values, with the same words for every format."""

from __future__ import annotations

import torch

from quant.errors import QuantizationError


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
