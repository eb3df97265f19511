"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding errors are carried to later columns.

Columns are quantized one after the other. What rounding a column adds to the layer's output is
compensated, as well as it can be, by the columns that are still to come; the inverse of the inputs'
second moment says how. With ``H^-1 = U^T U``, U upper triangular, and the column's error
``e = (w - q) / U[j, j]``, later columns lose ``e * U[j, j + 1:]``.

Scales are those of `quant.rtn`'s exact search: the best bfloat16 number for the group's weights as
they stand when the group's turn comes, or, with activation order, as they were at first, so that
the groups keep their columns ("static groups"). The tables of a palette cover whole rows, so they
are chosen before the first column, by k-means that weighs each column as `importance_of` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch

from quant.errors import QuantizationError
from quant.formats import IntFormat, PaletteFormat
from quant.kmeans import PalettizedRows
from quant.packing import pack_bits, pack_codes, unpack_codes
from quant.rtn import RTN, QuantizedRows
from quant.second_moment import check_moment
from quant.signed import SignedRoundToNearest
from quant.threads import run_all
from quant.weighted_kmeans import weighted_tables

# Columns whose updates reach the rest of the matrix together, as one product.
_BLOCK: Final = 128
# Rows that go through all columns together: a block of theirs stays in a core's cache.
_ROWS: Final = 1024
# Above this width a factor in float64 takes too much memory: float32 first.
_WIDEST_DOUBLE: Final = 8192
_LARGEST_DAMPING: Final = 100.0
_SMALL_TRIANGLE: Final = 128
# Of a matrix that is reordered, so many rows at a time.
_GATHERED_ROWS: Final = 256


@dataclass(frozen=True)
class Gptq:
    """The quantizer ``gptq``, and its variants.

    Attributes:
        name: as in `quant.registry`.
        activation_order: quantize the columns with the largest inputs first, while there are still
            many that can compensate.
        damping: share of the mean of the second moment's diagonal that is added to it.
        signed: whether scales of symmetric integers may be below zero, as `quant.signed` says: the
            two searches find each group's, and not every runtime holds them.
    """

    name: str = "gptq"
    activation_order: bool = False
    damping: float = 0.01
    signed: bool = False

    def quantize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> QuantizedRows:
        """Quantize a whole matrix.

        Args:
            weight: float32 ``[rows, cols]``.
            moment: float64 ``[cols, cols]``, the inputs' second moment; it is overwritten.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            threads: How many to use; by default one per processor, four at most.

        Raises:
            QuantizationError: A weight that is NaN, infinite or too large, a shape that does not
                suit the format, or a second moment that is not finite.
        """
        rows, cols = weight.shape
        label = name or "weight"
        fmt.check(label, rows, cols)
        order, factor = self._order_and_factor(moment, cols, label)

        def quantize(start: int) -> QuantizedRows:
            some = weight[start : start + _ROWS]
            grid = _IntegerGrid(fmt, len(some), cols, label, start, self.signed)
            carried = _carry_errors(some, factor, grid, order)
            return QuantizedRows(
                pack_codes(carried.codes, fmt), *grid.parts(), *carried.squared_sums
            )

        return QuantizedRows.joined(run_all(quantize, range(0, rows, _ROWS), threads))

    def palettize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: PaletteFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> PalettizedRows:
        """Palettize a whole matrix; arguments and errors as in ``quantize_matrix``."""
        rows, cols = weight.shape
        label = name or "weight"
        fmt.check(label, rows, cols)
        order, factor = self._order_and_factor(moment, cols, label)
        lut = weighted_tables(
            weight, fmt, importance_of(factor, order), name=label, threads=threads
        )
        tables = lut.float()
        group = fmt.rows_per_group or rows
        step = max(1, _ROWS // group) * group if group < rows else _ROWS

        def palettize(start: int) -> PalettizedRows:
            some = weight[start : start + step]
            first = start // group
            grid = _PaletteGrid(tables[first : first + max(1, len(some) // group)])
            carried = _carry_errors(some, factor, grid, order)
            packed = pack_bits(carried.codes, fmt.bits).contiguous()
            return PalettizedRows(packed, lut, *carried.squared_sums)

        parts = run_all(palettize, range(0, rows, step), threads)
        return PalettizedRows.joined(parts, lut)

    def _order_and_factor(
        self, moment: torch.Tensor, cols: int, label: str
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The order of the columns, None for their own, and `inverse_factor` in that order."""
        check_moment(moment, cols, label)
        order = None
        if self.activation_order:
            order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        return order, inverse_factor(moment, self.damping, label, order)


def importance_of(factor: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """What a squared error of each column costs once later columns have compensated for it.

    The output error of all of GPTQ is the sum of ``e^2`` over the columns (see above), so that the
    error ``w - q`` of a column as it stands at its turn costs ``1 / U[j, j]^2``.

    Args:
        factor: `inverse_factor`, float32 ``[n, n]``.
        order: int64 ``[n]``, the columns in the factor's order; None for their own.

    Returns:
        float32 ``[n]``, in the columns' own order.

    >>> importance_of(torch.tensor([[0.5, 0.0], [0.0, 0.25]]), torch.tensor([1, 0]))
    tensor([16.,  4.])
    """
    costs = factor.diagonal().square().reciprocal()
    if order is None:
        return costs
    return torch.empty_like(costs).scatter_(0, order, costs)


def inverse_factor(
    moment: torch.Tensor,
    damping: float,
    name: str = "weight",
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """The upper triangular U with ``U^T U = (moment + damping * mean(diagonal) * I)^-1``.

    Where the damped matrix has no Cholesky factor the damping grows tenfold until it has: a text of
    few directions, one repeated token in the extreme, gives a singular matrix. Beside the moment
    one more matrix of its size is held.

    Args:
        moment: float64 ``[n, n]``, symmetric; overwritten.
        damping: share of the diagonal's mean.
        name: The weight's name, for messages.
        order: int64 ``[n]``, the columns in the order of the factor's; None for their own.

    Returns:
        float32 ``[n, n]``, zero below the diagonal.

    Raises:
        QuantizationError: The moment is not finite.

    >>> inverse_factor(torch.tensor([[4.0, 0.0], [0.0, 16.0]], dtype=torch.float64), 0.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    diagonal = moment.diagonal().clone()
    mean = float(diagonal.mean())
    if not bool(torch.isfinite(diagonal).all()):
        raise QuantizationError(
            f"{name}: the second moment of its inputs is not finite; calibration cannot use it"
        )
    if mean <= 0.0:
        diagonal[:], mean = 1.0, 1.0
    size = len(moment)
    dtypes = [torch.float64] if size <= _WIDEST_DOUBLE else [torch.float32, torch.float64]
    # H = R R^T with R upper triangular is a Cholesky factorisation from the last column to the
    # first; then H^-1 = R^-T R^-1, and no inverse of the whole matrix is formed.
    backwards = (torch.arange(size) if order is None else order).flip(0)
    while True:
        damped = (diagonal + damping * mean)[backwards]
        for dtype in dtypes:
            lower = _lower_factor(moment, damped, backwards, dtype)
            if lower is not None:
                return _inverse_of_reversed(lower, moment)
        damping = max(10.0 * damping, 1e-6)
        if damping > _LARGEST_DAMPING:
            raise QuantizationError(
                f"{name}: the second moment of its inputs has no Cholesky factor; calibration "
                f"cannot use it"
            )


def _lower_factor(
    moment: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """The Cholesky factor of a reordered matrix with another diagonal, None where it has none."""
    held = torch.empty(moment.shape, dtype=dtype)
    for start in range(0, len(moment), _GATHERED_ROWS):
        stop = start + _GATHERED_ROWS
        held[start:stop] = moment[order[start:stop]][:, order]
    held.diagonal().copy_(diagonal)
    # In place: the matrix is its own transpose, and LAPACK's factor is laid out by columns.
    lower, info = held.t(), torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    whole = int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all())
    return lower if whole else None


def _inverse_of_reversed(lower: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """The inverse, float32, of the upper triangle that is ``lower`` from the last to the first.

    Args:
        lower: laid out by columns.
        room: of the same shape, written to where its dtype is the same.
    """
    size, columns = len(lower), lower.t()
    transposed = room if room.dtype == lower.dtype else torch.empty_like(columns)
    for start in range(0, size, _GATHERED_ROWS):
        stop = min(start + _GATHERED_ROWS, size)
        transposed[start:stop] = columns[size - stop : size - start].flip(0, 1)
    _invert_upper(transposed.t())
    return torch.empty(lower.shape).copy_(transposed.t())


def _invert_upper(matrix: torch.Tensor) -> None:
    """Inverts an upper triangular matrix in place, by halves: nearly all of it is products."""
    size = len(matrix)
    if size <= _SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=matrix.dtype)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    first, last = matrix[:half, :half], matrix[half:, half:]
    _invert_upper(first)
    _invert_upper(last)
    corner = matrix[:half, half:]
    corner.copy_((first @ corner) @ last).neg_()


class _Grid(Protocol):
    """The values that each row's weights may take."""

    @property
    def group_size(self) -> int | None:
        """Columns whose values are chosen together at their turn; None for all columns."""

    def fit(self, group: int, values: torch.Tensor) -> None:
        """Chooses a group's values for its weights, ``[group_size, rows]``."""

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, and what they stand for, of one column: ``[rows]`` each."""


class _IntegerGrid:
    """Integers with a scale and a zero point a group.

    Args:
        fmt: the format.
        rows: how many.
        cols: how many.
        name: the weight's, for messages.
        first_row: of the rows in the whole weight, for messages.
        signed: whether scales may be below zero.
    """

    def __init__(
        self, fmt: IntFormat, rows: int, cols: int, name: str, first_row: int, signed: bool
    ) -> None:
        self._quantizer = SignedRoundToNearest() if signed else RTN
        self._fmt, self._name, self._first_row = fmt, name, first_row
        self._single = IntFormat(fmt.bits, None, fmt.symmetric)
        self.group_size = fmt.columns_per_group(cols)
        groups = fmt.groups(cols)
        self._scale = torch.empty(groups, rows)
        self._zero = torch.full((groups, rows), float(fmt.implicit_zero_point))

    def fit(self, group: int, values: torch.Tensor) -> None:
        """Chooses a group's scales and zero points."""
        found = self._quantizer.quantize_rows(
            values.t(), self._single, name=self._name, first_row=self._first_row
        )
        self._scale[group] = found.scale[:, 0].float()
        if found.zero_point is not None:
            self._zero[group] = unpack_codes(found.zero_point, self._fmt, 1)[:, 0].float()

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 codes and what they stand for."""
        group = column // self.group_size
        scale, zero = self._scale[group], self._zero[group]
        codes = torch.div(values, scale).round_().add_(zero).clamp_(0.0, float(self._fmt.max_code))
        return codes, (codes - zero).mul_(scale)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points as the format stores them."""
        scale = self._scale.t().to(torch.bfloat16).contiguous()
        if self._fmt.symmetric:
            return scale, None
        return scale, pack_codes(self._zero.t().to(torch.uint8), self._fmt)


class _PaletteGrid:
    """Tables that as many rows share as there are rows for each.

    Args:
        tables: float32 ``[tables, entries]``, ascending.
    """

    group_size: Final = None

    def __init__(self, tables: torch.Tensor) -> None:
        self._tables = tables
        self._edges = ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()

    def fit(self, group: int, values: torch.Tensor) -> None:
        """Nothing: the tables are known."""

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Int64 codes of the nearest entries, the lower of two as near, and the entries."""
        shared = values.reshape(len(self._tables), -1)
        codes = torch.searchsorted(self._edges, shared)
        return codes.reshape(-1), self._tables.gather(1, codes).reshape(-1)


@dataclass(frozen=True)
class _Carried:
    """Rows that went through all columns.

    Attributes:
        codes: uint8 ``[rows, cols]``.
        squared_sums: of ``weight - stored value``, and of the weights.
    """

    codes: torch.Tensor
    squared_sums: tuple[float, float]


def _carry_errors(
    weight: torch.Tensor, factor: torch.Tensor, grid: _Grid, order: torch.Tensor | None
) -> _Carried:
    """Some rows through all columns; no row sees another."""
    rows, cols = weight.shape
    size = grid.group_size or cols
    groups = cols // size
    columns = weight.t().contiguous()  # a column of the matrix is contiguous
    original = columns
    places = list(range(cols)) if order is None else order.tolist()
    if order is not None or groups == 1:
        for group in range(groups):
            grid.fit(group, columns[group * size : (group + 1) * size])
    columns = columns.clone() if order is None else columns[order]
    codes = torch.empty(cols, rows, dtype=torch.uint8)
    residual = torch.empty(cols, rows)
    block = _block_of(size, groups)
    diagonal = factor.diagonal().tolist()
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        errors = torch.empty(stop - start, rows)
        for index in range(start, stop):
            place = places[index]
            if order is None and groups > 1 and index % size == 0:
                grid.fit(index // size, columns[index : index + size])
            code, value = grid.round(columns[index], place)
            codes[place] = code
            torch.sub(original[place], value, out=residual[place])
            error = torch.sub(columns[index], value, out=errors[index - start])
            error.div_(diagonal[index])
            if index + 1 < stop:
                columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], error, alpha=-1)
        if stop < cols:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return _Carried(
        codes.t().contiguous(),
        (
            float(residual.square().sum(dtype=torch.float64)),
            float(original.square().sum(dtype=torch.float64)),
        ),
    )


def _block_of(size: int, groups: int) -> int:
    """Columns of a block: whole groups, for a group's weights must be up to date at its turn."""
    return _BLOCK if groups == 1 else size * max(1, _BLOCK // size)
