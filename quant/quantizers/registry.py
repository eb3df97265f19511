"""Quantizers by the names that recipes use. A new one needs a file, an import and a row here."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from quant.formats.formats import IntFormat, PaletteFormat
from quant.plans.algorithms import SIGNED
from quant.quantizers import kmeans, rtn
from quant.quantizers.awq import Awq
from quant.quantizers.gptq import Gptq
from quant.quantizers.input_statistics import InputStatistics
from quant.quantizers.kmeans import PalettizedRows
from quant.quantizers.kmeans_weighted import WeightedKMeans
from quant.quantizers.rtn import QuantizedRows
from quant.quantizers.rtn_minmax import MinMaxRoundToNearest
from quant.quantizers.rtn_signed import SignedRoundToNearest
from quant.quantizers.smoothquant import SmoothQuant


class RowQuantizer(Protocol):
    """A quantizer that treats each row on its own, so that chunks of rows may come in any order."""

    @property
    def name(self) -> str:
        """The name in the literature, which is the key in `QUANTIZERS`."""

    def quantize_rows(
        self, weight: torch.Tensor, fmt: IntFormat, *, name: str = "", first_row: int = 0
    ) -> QuantizedRows:
        """Returns codes, scales and zero points of ``float[rows, columns]``.

        Raises:
            QuantizationError: the format cannot hold the weight; the message gives ``name`` and
                row.
        """


class Palettizer(Protocol):
    """A quantizer that treats each group of rows on its own, so that groups may come in any order.

    One table for a whole matrix takes two passes over the matrix.
    """

    @property
    def name(self) -> str:
        """The name in the literature, which is the key in `PALETTIZERS`."""

    def quantize_groups(
        self, weight: torch.Tensor, fmt: PaletteFormat, *, name: str = "", first_row: int = 0
    ) -> PalettizedRows:
        """Returns codes and tables of ``float[rows, columns]``, whose rows are whole groups.

        Raises:
            QuantizationError: the format cannot hold the weight; the message gives ``name`` and
                row.
        """

    def count_values(
        self, weight: torch.Tensor, *, name: str = "", first_row: int = 0
    ) -> torch.Tensor:
        """Counts the values of some rows, the first of two passes; counts add up over a matrix."""

    def table_of_counts(self, counts: torch.Tensor, fmt: PaletteFormat) -> torch.Tensor:
        """Returns a matrix's one table, as ``quantize_groups`` of the whole matrix finds it."""

    def look_up_rows(
        self, weight: torch.Tensor, fmt: PaletteFormat, lut: torch.Tensor
    ) -> PalettizedRows:
        """Codes rows by a given table, the second of two passes."""


QUANTIZERS: dict[str, RowQuantizer] = {
    "rtn": rtn.RoundToNearest(),
    SIGNED: SignedRoundToNearest(),
    "rtn-minmax": MinMaxRoundToNearest(),
}
PALETTIZERS: dict[str, Palettizer] = {"kmeans": kmeans.KMeans()}


class CalibratedQuantizer(Protocol):
    """A quantizer that needs the second moment of a matrix's inputs from a calibration text.

    Calibration gives it the weights in the program's order.
    """

    @property
    def name(self) -> str:
        """The name in the literature, which is the key in `CALIBRATED`."""

    def quantize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> QuantizedRows:
        """Returns codes, scales and zero points of ``float32[rows, columns]``.

        Args:
            weight: float32 ``[rows, columns]``, the matrix to quantize.
            moment: float64 ``[columns, columns]``, the mean of ``x x^T`` over the inputs; it may
                be overwritten.
            fmt: the integer format to store.
            name: the weight's name, for messages.
            threads: number of threads; None for the default.

        Raises:
            QuantizationError: the format cannot hold the weight; the message gives ``name`` and
                row.
        """


class CalibratedPalettizer(Protocol):
    """A `CalibratedQuantizer` for palette formats."""

    @property
    def name(self) -> str:
        """The name in the literature, which is the key in `CALIBRATED_PALETTIZERS`."""

    def palettize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: PaletteFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> PalettizedRows:
        """Returns codes and tables; arguments and errors as in `CalibratedQuantizer`."""


class RescalingQuantizer(CalibratedQuantizer, Protocol):
    """A calibrated quantizer that first multiplies columns whose inputs can be divided instead.

    It calibrates on the float program, not on the outputs of weights quantized before.
    """

    def column_factors(
        self, weight: torch.Tensor, inputs: InputStatistics, fmt: IntFormat, ties: torch.Tensor
    ) -> torch.Tensor:
        """Returns the factor of every column, ``float32[columns]``.

        Args:
            weight: ``float32[rows, columns]``.
            inputs: the statistics of the inputs.
            fmt: the integer format to store.
            ties: int64 ``[columns]``; columns with the same number must take the same factor.
        """


RESCALING: dict[str, RescalingQuantizer] = {
    "awq": Awq(),
    "smoothquant": SmoothQuant(),
    "smoothquant-search": SmoothQuant("smoothquant-search", exponent=None),
}

_DESCENT = Gptq("gptq-descent", activation_order=True, sweeps=2)
_GPTQ = {
    "gptq": Gptq(),
    "gptq-order": Gptq("gptq-order", activation_order=True),
    _DESCENT.name: _DESCENT,
}

CALIBRATED: dict[str, CalibratedQuantizer] = {
    **_GPTQ,
    "gptq-signed": Gptq("gptq-signed", activation_order=True, signed=True),
    "gptq-descent-signed": replace(_DESCENT, name="gptq-descent-signed", signed=True),
    **RESCALING,
}
CALIBRATED_PALETTIZERS: dict[str, CalibratedPalettizer] = {
    "kmeans-weighted": WeightedKMeans(),
    **_GPTQ,
}
