"""Computes how much of a column's rounding error each later column compensates.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) subtracts ``(w_k - q_k) / U[k, k] * U[k, i]`` from
every later column ``i``, where ``w_k`` is column ``k``'s value at its turn, ``U`` is upper
triangular, and ``H^-1 = U^T U``. Together these updates are the least squares answer to all earlier
errors, which needs no inverse: let ``H = R R^T`` with R upper triangular, and let ``d_k`` be the
*whole* error of column ``k``, from its original value to the stored one. Then the output error is
``sum_i (R^T d)_i^2``, and column ``i`` makes its term zero by becoming

    w_i + sum_{k < i} R[k, i] / R[i, i] * d_k

So one Cholesky factorisation suffices, and a column receives the errors of all earlier columns at
once, at its turn. Its value before its turn is not defined by this formula. Where that value is
needed (`Feedback.unrounded`), the columns in between compensate as if they were not rounded.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import torch

from quant.errors import QuantizationError
from quant.kernels.threads import single_threaded_torch

# Above this width a float64 factor takes too much time and memory: float32 is tried first.
WIDEST_DOUBLE: Final = 4096
_LARGEST_DAMPING: Final = 100.0
# Up to this width one thread is faster: torch's threads would wait for each other in every short
# operator, and much longer where other work wants the processors.
_WIDEST_ALONE: Final = 2048
# A matrix is reordered about so many elements at a time, so that they stay in a core's cache.
TOGETHER: Final = 1 << 16


@dataclass(frozen=True)
class Feedback:
    """The shares of each other's errors that columns compensate, in the order of rounding.

    Attributes:
        order: int64 ``[columns]``: the index in the matrix of the column that is rounded first,
            second, and so on; None for the matrix's own order.
        shares: float32 ``[columns, columns]``: row ``i`` holds, left of the diagonal, the shares of
            earlier columns' errors that column ``i`` compensates. Other elements have no meaning.
        costs: float32 ``[columns]``: what a squared error of each column adds to the output's
            squared error after later columns have compensated what they can.
        hessian: float32 ``[columns, columns]``: the damped second moment in the matrix's own order;
            None unless it was asked for.
    """

    order: torch.Tensor | None
    shares: torch.Tensor
    costs: torch.Tensor
    hessian: torch.Tensor | None = None

    def importance(self) -> torch.Tensor:
        """Returns the costs in the matrix's own order, float32 ``[columns]``.

        >>> Feedback(torch.tensor([1, 0]), torch.eye(2), torch.tensor([4.0, 9.0])).importance()
        tensor([9., 4.])
        """
        if self.order is None:
            return self.costs
        return torch.empty_like(self.costs).scatter_(0, self.order, self.costs)

    def unrounded(self, first: int, wanted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns some columns' values after they compensate all errors before them, unrounded.

        Args:
            first: position of the first of these columns in the order of rounding.
            wanted: float32 ``[some columns, rows]``: their values with the shares of the errors
                before ``first``.
            weight: float32 ``[some columns, rows]``: their original values.

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
    moment: torch.Tensor,
    *,
    damping: float,
    by_activation: bool = False,
    keep_hessian: bool = False,
    name: str = "weight",
) -> Feedback:
    """Returns the feedback of a matrix whose inputs have this second moment.

    A text whose inputs span few directions, such as one repeated token, gives a singular matrix:
    where the damped matrix has no Cholesky factor, the damping grows tenfold until it has one.
    Meanwhile the function holds one more matrix of the moment's size, in float64, or in float32
    above a width of 4096 unless float32 fails.

    Args:
        moment: float64 ``[columns, columns]``, symmetric; the feedback overwrites it.
        damping: the fraction of the diagonal's mean that is added to the diagonal.
        by_activation: whether columns are rounded in the order of falling mean square inputs.
        keep_hessian: whether the feedback holds the damped moment too; it takes no more memory.
        name: The weight's name, for messages.

    Raises:
        QuantizationError: The moment is not finite, or has no Cholesky factor at the largest
            damping.

    >>> found = error_feedback(torch.tensor([[5.0, 2.0], [2.0, 1.0]]).double(), damping=0.0)
    >>> found.shares[1, 0], found.costs
    (tensor(2.), tensor([1., 1.]))
    """
    with single_threaded_torch() if len(moment) <= _WIDEST_ALONE else nullcontext():
        return _feedback(moment, damping, by_activation, keep_hessian, name)


def _feedback(
    moment: torch.Tensor, damping: float, by_activation: bool, keep_hessian: bool, name: str
) -> Feedback:
    """`error_feedback`, with as many threads as torch has now."""
    size = len(moment)
    diagonal = moment.diagonal().clone()
    mean = float(diagonal.mean())
    if not bool(torch.isfinite(diagonal).all()):
        raise QuantizationError(
            f"{name}: the second moment of its inputs is not finite, so calibration cannot use it: "
            f"quantize it with an algorithm without calibration"
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
                first, second = _room(moment)
                hessian = None
                if keep_hessian:
                    hessian = _narrowed(moment, first)
                    hessian.diagonal().copy_(diagonal + damping * mean)
                shares = second.copy_(factor.div_(own[:, None]))
                return Feedback(order, shares, own.square_().float(), hessian)
        damping = max(10.0 * damping, 1e-6)
        if damping > _LARGEST_DAMPING:
            raise QuantizationError(
                f"{name}: the second moment of its inputs has no Cholesky factor, so calibration "
                f"cannot use it: quantize it with an algorithm without calibration"
            )


def _factor(
    moment: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns the transposed Cholesky factor of the reordered moment with the given diagonal.

    Returns None where there is no factor in the given dtype.
    """
    held = torch.empty(moment.shape, dtype=dtype)
    step = max(1, TOGETHER // len(moment))
    for start in range(0, len(moment), step):
        stop = start + step
        held[start:stop] = moment[order[start:stop]][:, order]
    held.diagonal().copy_(diagonal)
    # The transposed view lets LAPACK, which stores matrices by columns, factorise in place.
    lower, info = held.t(), torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    whole = int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all())
    return held if whole else None


def _room(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two float32 matrices of the moment's shape, in its memory where it is contiguous."""
    if not moment.is_contiguous():
        return torch.empty(moment.shape), torch.empty(moment.shape)
    halves = moment.view(torch.float32).view(2, *moment.shape)
    return halves[0], halves[1]


def _narrowed(moment: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Writes the moment as float32 into ``room``, which may be the first half of its memory."""
    step = max(1, TOGETHER // len(moment))
    for start in range(0, len(moment), step):
        # A row is read before it is overwritten: float32 rows end before float64 rows begin.
        room[start : start + step] = moment[start : start + step].float()
    return room


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
