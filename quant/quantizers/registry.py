"""Quantizers by the name recipes give them. To add one: a file, an import, a row."""

from __future__ import annotations

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

    One table for a whole matrix is found in two passes over it.
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

    def count_values(
        self, weight: torch.Tensor, *, name: str = "", first_row: int = 0
    ) -> torch.Tensor:
        """First of two passes for one table: counts of rows' values, which add up over a matrix."""

    def table_of_counts(self, counts: torch.Tensor, fmt: PaletteFormat) -> torch.Tensor:
        """The one table of a matrix, as ``quantize_groups`` of the whole would find it."""

    def look_up_rows(
        self, weight: torch.Tensor, fmt: PaletteFormat, lut: torch.Tensor
    ) -> PalettizedRows:
        """Second of two passes: codes of rows into a table that is known."""


QUANTIZERS: dict[str, RowQuantizer] = {
    "rtn": rtn.RoundToNearest(),
    SIGNED: SignedRoundToNearest(),
    "rtn-minmax": MinMaxRoundToNearest(),
}
PALETTIZERS: dict[str, Palettizer] = {"kmeans": kmeans.KMeans()}


class CalibratedQuantizer(Protocol):
    """A quantizer that must know what enters a matrix: it takes weights in the program's order."""

    @property
    def name(self) -> str:
        """As in the literature, the key of `CALIBRATED`."""

    def quantize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> QuantizedRows:
        """Codes, scales and zero points of ``float32[rows, columns]``.

        Args:
            weight: as the checkpoint has it.
            moment: float64 ``[columns, columns]``, the mean of ``x x^T`` over the inputs; it may
                be overwritten.
            fmt: what to store.
            name: the weight's name, for messages.
            threads: how many to use.

        Raises:
            QuantizationError: a weight that the format cannot hold, by ``name`` and row.
        """


class CalibratedPalettizer(Protocol):
    """As `CalibratedQuantizer`, for palettes."""

    @property
    def name(self) -> str:
        """As in the literature, the key of `CALIBRATED_PALETTIZERS`."""

    def palettize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: PaletteFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> PalettizedRows:
        """Codes and tables of ``float32[rows, columns]``; as `CalibratedQuantizer`."""


class RescalingQuantizer(CalibratedQuantizer, Protocol):
    """A calibrated quantizer that multiplies columns first, where their inputs can be divided.

    It looks at what the float program gives, not at what quantized weights before it give.
    """

    def column_factors(
        self, weight: torch.Tensor, inputs: InputStatistics, fmt: IntFormat, ties: torch.Tensor
    ) -> torch.Tensor:
        """The factor of every column, ``float32[columns]``.

        Args:
            weight: ``float32[rows, columns]``.
            inputs: what calibration knows of the inputs.
            fmt: what to store.
            ties: int64 ``[columns]``; columns of one number must take one factor.
        """


RESCALING: dict[str, RescalingQuantizer] = {
    "awq": Awq(),
    "smoothquant": SmoothQuant(),
    "smoothquant-search": SmoothQuant("smoothquant-search", exponent=None),
}

_GPTQ = {"gptq": Gptq(), "gptq-order": Gptq("gptq-order", activation_order=True)}

CALIBRATED: dict[str, CalibratedQuantizer] = {
    **_GPTQ,
    "gptq-signed": Gptq("gptq-signed", activation_order=True, signed=True),
    **RESCALING,
}
CALIBRATED_PALETTIZERS: dict[str, CalibratedPalettizer] = {
    "kmeans-weighted": WeightedKMeans(),
    **_GPTQ,
}
