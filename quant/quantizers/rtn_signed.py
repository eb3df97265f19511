"""Round to nearest with scales of either sign: the side of a group that needs it gets more codes.

4-bit codes minus their implicit zero point range from -8 to 7: one side of zero has one step more
than the other. With a positive scale that is always the negative side; a negative scale gives the
step to the positive side, as llama.cpp's Q4_0 and onnxruntime's quantizer do. The quantizer
searches the scale exactly for both signs (`quant.quantizers.rtn`) and keeps the better one, so no
group is worse than with ``rtn``. Runtimes that require positive scales cannot use the result.
"""

from __future__ import annotations

from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.kernels import native
from quant.quantizers.rtn import RTN, QuantizedRows


class SignedRoundToNearest:
    """The quantizer ``rtn-signed``: no calibration data, two searches over the weights.

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
        made = RTN.quantize_rows(weight, fmt, name=name, first_row=first_row)
        if not fmt.symmetric:
            return made
        mirrored = RTN.quantize_rows(-weight, fmt, name=name, first_row=first_row)
        values = weight.to(torch.float32)
        weighted = native.is_weighted(fmt)
        flip = _errors(-values, mirrored, fmt, weighted) < _errors(values, made, fmt, weighted)
        rows, groups = made.scale.shape
        codes = torch.where(
            flip.unsqueeze(-1),
            mirrored.codes.reshape(rows, groups, -1),
            made.codes.reshape(rows, groups, -1),
        ).reshape(made.codes.shape)
        scale = torch.where(flip, -mirrored.scale, made.scale)
        stored = QuantizedRows(codes, scale, None, 0.0, made.squared_norm)
        error = float(_errors(values, stored, fmt, weighted=False).double().sum())
        return QuantizedRows(codes, scale, None, error, made.squared_norm)


def _errors(
    values: torch.Tensor, made: QuantizedRows, fmt: IntFormat, weighted: bool
) -> torch.Tensor:
    """Returns each group's sum of squared errors, as `rtn` counts them: ``float32[rows, groups]``.

    Weighted, each square is multiplied by the weight's importance (`native.is_weighted`).
    """
    groups = (*made.scale.shape, -1)
    change = (native.unpack(made.codes, made.scale, None, fmt) - values).square_().reshape(groups)
    if weighted:
        magnitude = values.abs().reshape(groups)
        change.mul_(magnitude + native.OFFSET * magnitude.amax(-1, keepdim=True))
    return change.sum(-1)
