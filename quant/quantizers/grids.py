"""Grids, the values that each row's weights may take, and the rounding of columns in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import torch

from quant.formats.formats import IntFormat
from quant.formats.packing import pack_codes, unpack_codes
from quant.kernels import native
from quant.kernels.native import Columns
from quant.quantizers.row_checks import LARGEST_STORED, SMALLEST_SCALE
from quant.quantizers.rtn import RTN
from quant.quantizers.rtn_signed import SignedRoundToNearest
from quant.quantizers.weighted_scales import weighted_scales


class Grid(Protocol):
    """The values that the weights of some rows may take."""

    @property
    def group_size(self) -> int | None:
        """Columns that share a grid, fitted at their turn; None when all columns share one."""

    def fit(self, group: int, values: torch.Tensor) -> None:
        """Chooses the grids of the groups from ``group`` on for weights ``[rows, columns]``."""

    def round_columns(self, columns: Columns) -> None:
        """Rounds columns in turn, each after adding its shares of the errors before it."""

    def refit(
        self, group: int, codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
    ) -> torch.Tensor:
        """Chooses a group's grid again for codes that stay.

        Args:
            group: the group's number.
            codes: uint8 ``[columns, rows]``, the group's codes.
            gradient: float32 ``[columns, rows]``, the group's part of ``H e``, where ``e`` is the
                error of whole rows.
            hessian: float32 ``[columns, columns]``, the group's part of H.

        Returns:
            float32 ``[columns, rows]``, what was added to the stored values.
        """


class IntegerGrid:
    """Integers with a scale and a zero point per group, by `quant.quantizers.rtn`'s exact search.

    Args:
        fmt: the integer format.
        rows: number of rows.
        cols: number of columns.
        name: the weight's name, for messages.
        first_row: index of the first of these rows in the whole weight, for messages.
        signed: whether scales may be negative, by `quant.quantizers.rtn_signed`.
        importance: float32 ``[cols]``, what a squared error of each column costs; scales of
            symmetric formats below 8 bits are then searched for the least cost. None where all
            columns cost the same.
    """

    def __init__(
        self,
        fmt: IntFormat,
        rows: int,
        cols: int,
        *,
        name: str = "",
        first_row: int = 0,
        signed: bool = False,
        importance: torch.Tensor | None = None,
    ) -> None:
        self._quantizer, self._signed = SignedRoundToNearest() if signed else RTN, signed
        self._fmt, self._name, self._first_row = fmt, name, first_row
        self._importance = importance if fmt.symmetric and fmt.bits < 8 else None
        self.group_size = fmt.columns_per_group(cols)
        groups = fmt.groups(cols)
        self._scale = torch.empty(groups, rows)
        self._zero = torch.full((groups, rows), float(fmt.implicit_zero_point))

    def fit(self, group: int, values: torch.Tensor) -> None:
        """Chooses the scales and zero points of the groups from ``group`` on."""
        found = self._quantizer.quantize_rows(
            values, self._fmt, name=self._name, first_row=self._first_row
        )
        count = found.scale.shape[1]
        scale = found.scale.float()
        if self._importance is not None:
            first = group * self.group_size
            costs = self._importance[first : first + values.shape[1]]
            scale = weighted_scales(values, costs, scale, self._fmt, signed=self._signed)
        self._scale[group : group + count] = scale.t()
        if found.zero_point is not None:
            points = unpack_codes(found.zero_point, self._fmt, count)
            self._zero[group : group + count] = points.t()

    def round_columns(self, columns: Columns) -> None:
        """Rounds columns in turn, halves to even, by the compiled kernel where it was built."""
        if native.available():
            native.round_on_integers(
                columns, self._scale, self._zero, self.group_size, self._fmt.max_code
            )
        else:
            round_in_turn(columns, self._nearest)

    def refit(
        self, group: int, codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
    ) -> torch.Tensor:
        """Chooses each row's scale by least squares, and keeps it where it lowers the error."""
        scale, steps = self._scale[group], codes.float().sub_(self._zero[group])
        # Adding ``d`` to the scale adds ``d^2 cost - 2 d gain`` to the squared error.
        gain = (steps * gradient).sum(0)
        cost = (steps * (hessian @ steps)).sum(0)
        fitted = (scale + gain / cost.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.bfloat16)
        change = fitted.float().sub_(scale)
        storable = (fitted.abs() >= SMALLEST_SCALE) & (fitted.abs() <= LARGEST_STORED)
        better = (change * (change * cost - 2.0 * gain) < 0.0) & (fitted * scale > 0.0) & storable
        change = torch.where(better, change, 0.0)
        scale += change
        return steps.mul_(change)

    def _nearest(self, wanted: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = (part[place // self.group_size] for part in (self._scale, self._zero))
        steps = torch.div(wanted, scale)
        steps = steps.minimum(self._fmt.max_code - zero).maximum(-zero).round_()
        return steps + zero, steps.mul_(scale)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns scales and zero points as the format stores them; None when it is symmetric."""
        scale = self._scale.t().to(torch.bfloat16).contiguous()
        if self._fmt.symmetric:
            return scale, None
        return scale, pack_codes(self._zero.t().to(torch.uint8), self._fmt)


class PaletteGrid:
    """The entries of tables; each table belongs to the same number of consecutive rows.

    Args:
        tables: float32 ``[tables, entries]``, ascending in each table.
    """

    group_size: Final = None

    def __init__(self, tables: torch.Tensor) -> None:
        self._tables = tables.contiguous()
        self._edges = ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()

    def fit(self, group: int, values: torch.Tensor) -> None:
        """Does nothing: the tables are chosen before the first column."""

    def refit(
        self, group: int, codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
    ) -> torch.Tensor:
        """Changes nothing: many rows share a table."""
        return torch.zeros_like(gradient)

    def round_columns(self, columns: Columns) -> None:
        """Rounds columns in turn to the nearest entries; of two as near, to the lower."""
        if native.available():
            native.round_on_tables(columns, self._tables, self._edges)
        else:
            round_in_turn(columns, self._nearest)

    def _nearest(self, wanted: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        shared = wanted.reshape(len(self._tables), -1)
        codes = torch.searchsorted(self._edges, shared)
        return codes.reshape(-1), self._tables.gather(1, codes).reshape(-1)


def round_in_turn(
    columns: Columns,
    nearest: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Rounds columns in turn with torch, bit for bit as the compiled kernels do.

    Args:
        columns: the columns to round, and where to write codes and errors.
        nearest: returns the codes and the stored values, ``[rows]`` each, of a column's wanted
            values ``[rows]`` and its index in the matrix.
    """
    wanted = columns.wanted.clone()
    for index, place in enumerate(columns.places.tolist()):
        code, value = nearest(wanted[index], place)
        columns.codes[place] = code
        error = torch.sub(columns.weight[index], value, out=columns.errors[index])
        # Multiply, then add: a fused operation would round once where the kernels round twice.
        wanted[index + 1 :] += columns.shares[index + 1 :, index, None] * error
