"""Round to nearest with scales of either sign: the side of a group that needs it gets more codes.

4-bit codes minus their implicit zero point range from -8 to 7: one side of zero has one step more
than the other. With a positive scale that is always the negative side; a negative scale gives the
step to the positive side, as llama.cpp's Q4_0 and onnxruntime's quantizer do. Where errors of
large weights count more (`native.is_weighted`), the best sign always gives the step to the side of
the largest weight, so only its scale is searched (`quant.quantizers.rtn`). For other formats both
signs are searched. Runtimes that require positive scales cannot use the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.kernels import native
from quant.quantizers.rtn import RTN, QuantizedRows


class SignedRoundToNearest:
    """The quantizer ``rtn-signed``: no calibration data.

    For asymmetric formats it gives the same result as ``rtn``: with a free zero point, the sign of
    the scale adds nothing.
    """

    name: Final = "rtn-signed"

    def quantize_rows(
        self, weight: torch.Tensor, fmt: IntFormat, *, name: str = "", first_row: int = 0
    ) -> QuantizedRows:
        """Quantizes rows of a weight matrix.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            first_row: Index of the first of these rows in the whole weight, for messages.

        Raises:
            QuantizationError: As `quant.quantizers.rtn.RoundToNearest`.
        """
        if fmt.symmetric and native.is_weighted(fmt):
            return _towards_the_largest(weight, fmt, name, first_row)
        made = RTN.quantize_rows(weight, fmt, name=name, first_row=first_row)
        if not fmt.symmetric:
            return made
        mirrored = RTN.quantize_rows(-weight, fmt, name=name, first_row=first_row)
        values = weight.to(torch.float32)
        flip = _errors(-values, mirrored, fmt) < _errors(values, made, fmt)
        rows, groups = made.scale.shape
        codes = torch.where(
            flip.unsqueeze(-1),
            mirrored.codes.reshape(rows, groups, -1),
            made.codes.reshape(rows, groups, -1),
        ).reshape(made.codes.shape)
        scale = torch.where(flip, -mirrored.scale, made.scale)
        stored = QuantizedRows(codes, scale, None, 0.0, made.squared_norm)
        error = float(_errors(values, stored, fmt).double().sum())
        return QuantizedRows(codes, scale, None, error, made.squared_norm)


def _towards_the_largest(
    weight: torch.Tensor, fmt: IntFormat, name: str, first_row: int
) -> QuantizedRows:
    """Quantizes rows whose groups are mirrored where the largest weight is positive."""
    if weight.dim() != 2:  # refused there
        return RTN.quantize_rows(weight, fmt, name=name, first_row=first_row)
    rows, columns = weight.shape
    fmt.check(name or "weight", rows, columns)
    groups = weight.reshape(rows, fmt.groups(columns), -1)
    flip = (groups.amax(-1) > -groups.amin(-1)).unsqueeze(-1)
    turned = torch.where(flip, -groups, groups).reshape(weight.shape)
    made = RTN.quantize_rows(turned, fmt, name=name, first_row=first_row)
    scale = torch.where(flip.squeeze(-1), -made.scale, made.scale)
    return replace(made, scale=scale)


def _errors(values: torch.Tensor, made: QuantizedRows, fmt: IntFormat) -> torch.Tensor:
    """Returns the sum of squared errors of each group, ``float32[rows, groups]``."""
    change = native.unpack(made.codes, made.scale, None, fmt) - values
    return change.reshape(*made.scale.shape, -1).square().sum(-1)
