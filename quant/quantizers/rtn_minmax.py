"""Plain round to nearest, the "RTN" of papers: scales from the extremes, without a search.

Papers compare with this baseline (GPTQ, arXiv 2210.17323, and AWQ, arXiv 2306.00978, among others).
A symmetric group's scale maps its largest magnitude to the largest positive code; an asymmetric
group's scale spreads the codes from the lowest to the highest weight, zero included. Scales are
rounded to bfloat16 before the integers are chosen, as in every quantizer here.
`quant.quantizers.rtn` stores the same parts but searches the scale, and is never worse in squared
error.
"""

from __future__ import annotations

from typing import Final

import torch

from quant.formats.formats import IntFormat
from quant.formats.packing import pack_codes
from quant.quantizers.row_checks import LARGEST_STORED, SMALLEST_SCALE, check_rows
from quant.quantizers.rtn import QuantizedRows


class MinMaxRoundToNearest:
    """The quantizer ``rtn-minmax``: no calibration data, no search."""

    name: Final = "rtn-minmax"

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
        check_rows(weight, fmt, name, first_row)
        rows, cols = weight.shape
        values = weight.to(torch.float32).reshape(rows, fmt.groups(cols), -1)
        lowest, highest = values.amin(-1).clamp_max(0.0), values.amax(-1).clamp_min(0.0)
        if fmt.symmetric:
            plain = torch.maximum(highest, -lowest) / (fmt.max_code // 2)
        else:
            plain = (highest - lowest) / fmt.max_code
        scale = plain.to(torch.bfloat16).clamp(SMALLEST_SCALE, LARGEST_STORED)
        wide = scale.float()
        zero = torch.full_like(wide, float(fmt.implicit_zero_point))
        if not fmt.symmetric:
            zero = (-lowest / wide).round().clamp(0.0, float(fmt.max_code))
        nearest = (values / wide.unsqueeze(-1)).round() + zero.unsqueeze(-1)
        codes = nearest.clamp(0.0, float(fmt.max_code))
        missed = values - (codes - zero.unsqueeze(-1)) * wide.unsqueeze(-1)
        return QuantizedRows(
            codes=pack_codes(codes.to(torch.uint8).reshape(rows, cols), fmt),
            scale=scale,
            zero_point=None if fmt.symmetric else pack_codes(zero.to(torch.uint8), fmt),
            squared_error=float(missed.square().sum(dtype=torch.float64)),
            squared_norm=float(values.square().sum(dtype=torch.float64)),
        )
