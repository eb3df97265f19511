"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding errors are carried to later columns.

Columns are quantized one after the other. What rounding a column adds to the layer's output is
compensated, as well as it can be, by the columns that are still to come; the inverse of the inputs'
second moment says how. With ``H^-1 = U^T U``, U upper triangular, and the column's error
``e = (w - q) / U[j, j]``, later columns lose ``e * U[j, j + 1:]``.

Scales are those of `quant.rtn`'s exact search: the best bfloat16 number for the group's weights as
they stand when the group's turn comes, or, with activation order, as they were at first, so that
the groups keep their columns ("static groups").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.errors import QuantizationError
from quant.formats import IntFormat
from quant.packing import pack_int4
from quant.rtn import RTN, QuantizedRows
from quant.threads import run_all

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
    """

    name: str = "gptq"
    activation_order: bool = False
    damping: float = 0.01

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
        if moment.shape != (cols, cols):
            raise QuantizationError(
                f"{label} has {cols} input columns; its second moment is {list(moment.shape)}"
            )
        order = None
        if self.activation_order:
            order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        factor = inverse_factor(moment, self.damping, label, order)
        done = run_all(
            lambda start: _quantize_rows(
                weight[start : start + _ROWS], factor, fmt, order, label, start
            ),
            range(0, rows, _ROWS),
            threads,
        )
        return QuantizedRows.joined(done)


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


class _IntegerGrid:
    """The values that each row's weights may take, group by group.

    Args:
        fmt: the format.
        rows: how many.
        groups: in each row.
    """

    def __init__(self, fmt: IntFormat, rows: int, groups: int) -> None:
        self._fmt = fmt
        self._single = IntFormat(fmt.bits, None, fmt.symmetric)
        self.scale = torch.empty(groups, rows)
        self.zero = torch.full((groups, rows), float(fmt.implicit_zero_point))

    def fit(self, group: int, values: torch.Tensor, name: str, first_row: int) -> None:
        """Chooses a group's scales and zero points for ``values``, ``[group_size, rows]``."""
        found = RTN.quantize_rows(values.t(), self._single, name=name, first_row=first_row)
        self.scale[group] = found.scale[:, 0].float()
        if found.zero_point is not None:
            self.zero[group] = found.zero_point[:, 0].float()

    def round(self, values: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and what they stand for, float32 ``[rows]`` each, of one column."""
        scale, zero = self.scale[group], self.zero[group]
        codes = torch.div(values, scale).round_().add_(zero).clamp_(0.0, float(self._fmt.max_code))
        return codes, (codes - zero).mul_(scale)


def _quantize_rows(
    weight: torch.Tensor,
    factor: torch.Tensor,
    fmt: IntFormat,
    order: torch.Tensor | None,
    name: str,
    first_row: int,
) -> QuantizedRows:
    """Some rows through all columns; no row sees another."""
    rows, cols = weight.shape
    size, groups = fmt.columns_per_group(cols), fmt.groups(cols)
    grid = _IntegerGrid(fmt, rows, groups)
    columns = weight.t().contiguous()  # a column of the matrix is contiguous
    original = columns
    places = list(range(cols)) if order is None else order.tolist()
    if order is not None or groups == 1:
        for group in range(groups):
            grid.fit(group, columns[group * size : (group + 1) * size], name, first_row)
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
                grid.fit(index // size, columns[index : index + size], name, first_row)
            code, value = grid.round(columns[index], place // size)
            codes[place] = code
            torch.sub(original[place], value, out=residual[place])
            error = torch.sub(columns[index], value, out=errors[index - start])
            error.div_(diagonal[index])
            if index + 1 < stop:
                columns[index + 1 : stop].addr_(factor[index, index + 1 : stop], error, alpha=-1)
        if stop < cols:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    stored = codes.t().contiguous()
    points = grid.zero.t().to(torch.uint8)
    packed_points = pack_int4(points) if fmt.bits == 4 else points.contiguous()
    return QuantizedRows(
        codes=pack_int4(stored) if fmt.bits == 4 else stored,
        scale=grid.scale.t().to(torch.bfloat16).contiguous(),
        zero_point=None if fmt.symmetric else packed_points,
        squared_error=float(residual.square().sum(dtype=torch.float64)),
        squared_norm=float(original.square().sum(dtype=torch.float64)),
    )


def _block_of(size: int, groups: int) -> int:
    """Columns of a block: whole groups, for a group's weights must be up to date at its turn."""
    return _BLOCK if groups == 1 else size * max(1, _BLOCK // size)
