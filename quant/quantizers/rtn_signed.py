"""Round to nearest with scales of either sign: the larger side of a group gets the extra code.

Codes less their implicit zero point go from -8 to 7: one side of zero has a step more than the
other. A positive scale gives it to the negative side always; with the sign free, each group gives
it to the side that needs it, as llama.cpp's Q4_0 and onnxruntime's quantizer do. Both signs are
searched exactly (`quant.quantizers.rtn`) and the better one is kept, so no group is worse than with
``rtn``. Runtimes whose scales are positive cannot hold the result.
"""

from __future__ import annotations

from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.kernels import native
from quant.quantizers.rtn import RTN, QuantizedRows


class SignedRoundToNearest:
    """The quantizer ``rtn-signed``: no calibration data, two searches over the weights.

    An asymmetric format's zero points leave the sign nothing to do: it becomes what ``rtn`` makes.
    """

    name: Final = "rtn-signed"

    def quantize_rows(
        self, weight: torch.Tensor, fmt: IntFormat, *, name: str = "", first_row: int = 0
    ) -> QuantizedRows:
        """Quantize rows of a weight matrix.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            first_row: Number of the first of these rows in the whole weight, for messages.

        Raises:
            QuantizationError: As `quant.quantizers.rtn.RoundToNearest`.
        """
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


def _errors(values: torch.Tensor, made: QuantizedRows, fmt: IntFormat) -> torch.Tensor:
    """Sum of squared errors of each group, ``float32[rows, groups]``."""
    change = native.unpack(made.codes, made.scale, None, fmt) - values
    return change.reshape(*made.scale.shape, -1).square().sum(-1)
