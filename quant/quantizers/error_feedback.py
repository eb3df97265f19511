"""How much of a column's rounding error later columns take over, from their second moment.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) subtracts ``(w_k - q_k) / U[k, k] * U[k, i]`` from
every later column ``i``, with ``w_k`` as it stands at its turn and ``U`` upper triangular,
``H^-1 = U^T U``. All together that is the least squares answer to earlier errors, which needs no
inverse. With ``H = R R^T``, R upper triangular, and ``d_k`` the *whole* error of column ``k``, from
its first value to the stored one, the output error is ``sum_i (R^T d)_i^2``, and column ``i`` makes
its term zero by becoming

    w_i + sum_{k < i} R[k, i] / R[i, i] * d_k

So one Cholesky factorisation is all: no inverse, and a column waits for its turn to hear of all
earlier ones at once. Before its turn its value means nothing: where it is needed, the columns in
between take over what they would if they could take any value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from quant.errors import QuantizationError

# Above this width a factor in float64 takes too much time and memory: float32 first.
WIDEST_DOUBLE: Final = 4096
_LARGEST_DAMPING: Final = 100.0
# Of a matrix that is reordered, about so many numbers at a time: they stay in a core's cache.
TOGETHER: Final = 1 << 16


@dataclass(frozen=True)
class Feedback:
    """What columns owe each other, in the order in which they are rounded.

    Attributes:
        order: int64 ``[columns]``, the place of every column in the matrix; None for their own.
        shares: float32 ``[columns, columns]``: in row ``i``, left of the diagonal, the shares of
            earlier columns' errors that column ``i`` takes over. The rest means nothing.
        costs: float32 ``[columns]``: what a squared error of each column adds to the output's once
            later columns have taken over what they can.
    """

    order: torch.Tensor | None
    shares: torch.Tensor
    costs: torch.Tensor

    def importance(self) -> torch.Tensor:
        """The costs in the columns' own order.

        >>> Feedback(torch.tensor([1, 0]), torch.eye(2), torch.tensor([4.0, 9.0])).importance()
        tensor([9., 4.])
        """
        if self.order is None:
            return self.costs
        return torch.empty_like(self.costs).scatter_(0, self.order, self.costs)

    def unrounded(self, first: int, wanted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What columns are once they have taken over the errors before all of them.

        Args:
            first: number of the first of them.
            wanted: float32 ``[some columns, rows]``: with the shares of errors before ``first``.
            weight: float32 ``[some columns, rows]``: as they were at first.

        >>> feedback = Feedback(None, torch.tensor([[1.0, 0.0], [0.5, 1.0]]), torch.ones(2))
        >>> feedback.unrounded(0, torch.tensor([[3.0], [3.0]]), torch.tensor([[1.0], [1.0]]))
        tensor([[3.],
                [2.]])
        """
        last = first + len(wanted)
        shares = self.shares[first:last, first:last]
        shift: torch.Tensor = torch.linalg.solve_triangular(
            shares, wanted - weight, upper=False, unitriangular=True
        )
        return weight + shift


def error_feedback(
    moment: torch.Tensor, *, damping: float, by_activation: bool = False, name: str = "weight"
) -> Feedback:
    """The feedback of a matrix whose inputs have this second moment.

    Where the damped matrix has no Cholesky factor the damping grows tenfold until it has: a text of
    few directions, one repeated token in the extreme, gives a singular matrix. Meanwhile one more
    matrix of the moment's size is held, in float32 above a width of 4096 unless float32 fails.

    Args:
        moment: float64 ``[columns, columns]``, symmetric; the feedback is written over it.
        damping: share of the diagonal's mean that is added to the diagonal.
        by_activation: whether columns are rounded in the order of falling inputs.
        name: The weight's name, for messages.

    Raises:
        QuantizationError: The moment is not finite.

    >>> found = error_feedback(torch.tensor([[5.0, 2.0], [2.0, 1.0]]).double(), damping=0.0)
    >>> found.shares[1, 0], found.costs
    (tensor(2.), tensor([1., 1.]))
    """
    size = len(moment)
    diagonal = moment.diagonal().clone()
    mean = float(diagonal.mean())
    if not bool(torch.isfinite(diagonal).all()):
        raise QuantizationError(
            f"{name}: the second moment of its inputs is not finite; calibration cannot use it"
        )
    if mean <= 0.0:
        diagonal[:], mean = 1.0, 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else None
    # R R^T with R upper triangular is a Cholesky factorisation from the last column to the first.
    backwards = (torch.arange(size) if order is None else order).flip(0)
    dtypes = [torch.float64] if size <= WIDEST_DOUBLE else [torch.float32, torch.float64]
    while True:
        damped = (diagonal + damping * mean)[backwards]
        for dtype in dtypes:
            factor = _factor(moment, damped, backwards, dtype)
            if factor is not None:
                _turn_around(factor)
                own = factor.diagonal().clone()
                shares = _room(moment).copy_(factor.div_(own[:, None]))
                return Feedback(order, shares, own.square_().float())
        damping = max(10.0 * damping, 1e-6)
        if damping > _LARGEST_DAMPING:
            raise QuantizationError(
                f"{name}: the second moment of its inputs has no Cholesky factor; calibration "
                f"cannot use it"
            )


def _factor(
    moment: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """The transposed Cholesky factor of a reordered matrix with another diagonal, or None."""
    held = torch.empty(moment.shape, dtype=dtype)
    step = max(1, TOGETHER // len(moment))
    for start in range(0, len(moment), step):
        stop = start + step
        held[start:stop] = moment[order[start:stop]][:, order]
    held.diagonal().copy_(diagonal)
    # In place: the matrix is its own transpose, and LAPACK's factor is laid out by columns.
    lower, info = held.t(), torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    whole = int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all())
    return held if whole else None


def _room(moment: torch.Tensor) -> torch.Tensor:
    """A float32 matrix of the same shape, in the moment's own memory where that is contiguous."""
    if not moment.is_contiguous():
        return torch.empty(moment.shape)
    return moment.view(torch.float32).view(-1)[: moment.numel()].view(moment.shape)


def _turn_around(matrix: torch.Tensor) -> None:
    """Reverses rows and columns in place."""
    size = len(matrix)
    step = max(1, TOGETHER // size)
    for start in range(0, size // 2, step):
        stop = min(start + step, size // 2)
        first, last = matrix[start:stop], matrix[size - stop : size - start]
        held = first.flip(0, 1)
        first.copy_(last.flip(0, 1))
        last.copy_(held)
    if size % 2:
        middle = matrix[size // 2]
        middle.copy_(middle.flip(0))
