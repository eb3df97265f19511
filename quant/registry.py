"""Quantizers by the name recipes give them. To add one: a file, an import, a row."""

from __future__ import annotations

from typing import Protocol

import torch

from quant import kmeans, rtn
from quant.formats import FloatFormat, IntFormat, PaletteFormat, WeightFormat
from quant.kmeans import PalettizedRows
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


class Palettizer(Protocol):
    """A quantizer that looks at a group of rows alone, so that groups may go in any order.

    A format with one table for the whole matrix has one group.
    """

    @property
    def name(self) -> str:
        """As in the literature, the key of `PALETTIZERS`."""

    def quantize_groups(
        self, weight: torch.Tensor, fmt: PaletteFormat, *, name: str = "", first_row: int = 0
    ) -> PalettizedRows:
        """Codes and tables of ``float[rows, columns]``, whose rows are whole groups.

        Raises:
            QuantizationError: a weight that the format cannot hold, by ``name`` and row.
        """


QUANTIZERS: dict[str, RowQuantizer] = {"rtn": rtn.RoundToNearest()}
PALETTIZERS: dict[str, Palettizer] = {"kmeans": kmeans.KMeans()}


def algorithms_for(format: WeightFormat) -> tuple[str, ...]:
    """The algorithms that can fill a format, the one to take when none is asked for first."""
    match format:
        case IntFormat():
            return tuple(QUANTIZERS)
        case PaletteFormat():
            return tuple(PALETTIZERS)
        case FloatFormat():
            return ("cast",)
