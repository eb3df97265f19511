"""Quantizers by the name recipes give them. To add one: a file, an import, a row."""

from __future__ import annotations

from typing import Protocol

import torch

from quant import rtn
from quant.formats import IntFormat
from quant.rtn import QuantizedRows


class RowQuantizer(Protocol):
    """A quantizer that looks at a row alone, so that chunks may go in any order."""

    @property
    def name(self) -> str:
        """As in the literature, the key of `QUANTIZERS`."""

    def quantize_rows(
        self, weight: torch.Tensor, fmt: IntFormat, *, name: str = "", first_row: int = 0
    ) -> QuantizedRows:
        """Codes, scales and zero points of ``float[rows, columns]``.

        Raises:
            QuantizationError: a weight that the format cannot hold, by ``name`` and row.
        """


QUANTIZERS: dict[str, RowQuantizer] = {"rtn": rtn.RoundToNearest()}
