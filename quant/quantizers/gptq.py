"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): later columns compensate earlier rounding errors.

GPTQ quantizes one column after the other. Columns that are not yet rounded compensate, as well as
they can, the output error of each rounded column: `quant.quantizers.error_feedback` explains how.

The scales come from `quant.quantizers.rtn`'s exact search: the best bfloat16 number for the group's
weights as they are when the group's turn comes. With activation order the search takes the original
weights instead, so that groups keep their columns ("static groups"). A palette's tables cover whole
rows, so k-means chooses them before the first column is rounded; it weighs each column by what an
error in it costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.formats.formats import IntFormat, PaletteFormat
from quant.formats.packing import pack_bits, pack_codes
from quant.kernels.native import Columns
from quant.kernels.threads import run_all
from quant.quantizers.coordinate_descent import descend
from quant.quantizers.error_feedback import Feedback, error_feedback
from quant.quantizers.grids import Grid, IntegerGrid, PaletteGrid
from quant.quantizers.input_statistics import check_moment
from quant.quantizers.kmeans import PalettizedRows
from quant.quantizers.kmeans_weighted import weighted_tables
from quant.quantizers.rtn import QuantizedRows

# Columns in a block: one matrix product adds the errors of all earlier blocks to the whole block.
BLOCK_COLUMNS: Final = 128
# The most rows in a chunk.
ROWS_AT_ONCE: Final = 512


@dataclass(frozen=True)
class Gptq:
    """The quantizer ``gptq``, and its variants.

    Attributes:
        name: the name in `quant.quantizers.registry`.
        activation_order: whether the columns with the largest inputs are quantized first, while
            many columns can still compensate.
        damping: the fraction of the diagonal's mean that is added to the second moment's diagonal.
        signed: whether scales of symmetric integers may be negative, searched as in
            `quant.quantizers.rtn_signed`. Not every runtime accepts negative scales.
        sweeps: how many times columns are decided again after the last one was rounded
            (`quant.quantizers.coordinate_descent`). If any, scales are searched for what errors
            cost after compensation, and refitted. At 8 bits there is nothing to gain, so nothing
            is done again.
    """

    name: str = "gptq"
    activation_order: bool = False
    damping: float = 0.01
    signed: bool = False
    sweeps: int = 0

    def quantize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> QuantizedRows:
        """Quantizes a whole matrix.

        Args:
            weight: float32 ``[rows, cols]``.
            moment: float64 ``[cols, cols]``, the inputs' second moment; it is overwritten.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            threads: Number of threads; by default one per processor, four at most.

        Raises:
            QuantizationError: A weight that is NaN, infinite or too large, a shape that does not
                suit the format, or a second moment that is not finite.
        """
        rows, cols = weight.shape
        label = name or "weight"
        fmt.check(label, rows, cols)
        sweeps = self.sweeps if fmt.bits < 8 else 0
        feedback = self._feedback(moment, cols, label)
        step = _chunk(rows)

        def quantize(start: int) -> QuantizedRows:
            some = weight[start : start + step]
            grid = IntegerGrid(
                fmt,
                len(some),
                cols,
                name=label,
                first_row=start,
                signed=self.signed,
                importance=feedback.importance() if sweeps else None,
            )
            carried = _carry_errors(some, feedback, grid, sweeps)
            return QuantizedRows(
                pack_codes(carried.codes, fmt), *grid.parts(), *carried.squared_sums
            )

        return QuantizedRows.joined(run_all(quantize, range(0, rows, step), threads))

    def palettize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: PaletteFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> PalettizedRows:
        """Palettizes a whole matrix; arguments and errors as in ``quantize_matrix``."""
        rows, cols = weight.shape
        label = name or "weight"
        fmt.check(label, rows, cols)
        feedback = self._feedback(moment, cols, label)
        lut = weighted_tables(weight, fmt, feedback.importance(), name=label, threads=threads)
        tables = lut.float()
        group = fmt.rows_per_group or rows
        step = max(1, _chunk(rows) // group) * group if group < rows else _chunk(rows)

        def palettize(start: int) -> PalettizedRows:
            some = weight[start : start + step]
            first = start // group
            grid = PaletteGrid(tables[first : first + max(1, len(some) // group)])
            carried = _carry_errors(some, feedback, grid, self.sweeps if fmt.bits < 8 else 0)
            packed = pack_bits(carried.codes, fmt.bits).contiguous()
            return PalettizedRows(packed, lut, *carried.squared_sums)

        parts = run_all(palettize, range(0, rows, step), threads)
        return PalettizedRows.joined(parts, lut)

    def _feedback(self, moment: torch.Tensor, cols: int, label: str) -> Feedback:
        check_moment(moment, cols, label)
        return error_feedback(
            moment,
            damping=self.damping,
            by_activation=self.activation_order,
            keep_hessian=self.sweeps > 0,
            name=label,
        )


def _chunk(rows: int) -> int:
    """Returns how many rows to quantize at once: an even number of chunks, as equal as they can be.

    It depends on the rows alone, so that the result does not depend on the number of threads.

    >>> _chunk(576), _chunk(1536), _chunk(49152)
    (288, 384, 512)
    """
    pairs = -(-rows // (2 * ROWS_AT_ONCE))
    return -(-rows // (2 * pairs))


@dataclass(frozen=True)
class _Carried:
    """Some rows after the rounding of all columns.

    Attributes:
        codes: uint8 ``[rows, cols]``.
        squared_sums: the sum of squares of ``weight - stored value``, and that of the weights.
    """

    codes: torch.Tensor
    squared_sums: tuple[float, float]


def _carry_errors(
    weight: torch.Tensor, feedback: Feedback, grid: Grid, sweeps: int = 0
) -> _Carried:
    """Rounds all columns of some rows in turn; rows do not depend on each other.

    Args:
        weight: float32 ``[rows, cols]``.
        feedback: the shares of errors; it holds the Hessian where there are sweeps.
        grid: the grid of these rows.
        sweeps: how many times all columns are decided again.
    """
    rows, cols = weight.shape
    size = grid.group_size or cols
    fits_in_turn = feedback.order is None and size < cols
    if not fits_in_turn:
        grid.fit(0, weight)
    columns = weight.t().contiguous()  # transposed, so that each column is contiguous
    places = torch.arange(cols)
    if feedback.order is not None:
        columns, places = columns[feedback.order], feedback.order
    codes = torch.empty(cols, rows, dtype=torch.uint8)
    errors = torch.empty(cols, rows)
    # Groups that are fitted in turn need up-to-date weights, so a block holds whole groups.
    block = size * max(1, BLOCK_COLUMNS // size) if fits_in_turn else BLOCK_COLUMNS
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        known = feedback.shares[start:stop, :start]
        wanted = torch.addmm(columns[start:stop], known, errors[:start])
        step = size if fits_in_turn else block
        for first in range(start, stop, step):
            last = min(first + step, stop)
            shares, own = feedback.shares[first:last], wanted[first - start : last - start]
            own.addmm_(shares[:, start:first], errors[start:first])
            if fits_in_turn:
                grid.fit(first // size, feedback.unrounded(first, own, columns[first:last]).t())
            grid.round_columns(
                Columns(
                    own,
                    columns[first:last],
                    shares[:, first:last],
                    places[first:last],
                    codes,
                    errors[first:last],
                )
            )
    if sweeps:
        assert feedback.hessian is not None
        if feedback.order is not None:
            columns = weight.t().contiguous()
            errors = torch.empty_like(errors).index_copy_(0, feedback.order, errors)
        descend(columns, codes, errors, feedback.hessian, grid, sweeps=sweeps, block=BLOCK_COLUMNS)
    return _Carried(codes.t().contiguous(), (_sum_of_squares(errors), _sum_of_squares(weight)))


def _sum_of_squares(matrix: torch.Tensor) -> float:
    """The sum of squares of all elements, computed row by row without a copy."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
