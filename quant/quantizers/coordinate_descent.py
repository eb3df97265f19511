"""Lowers the output error of rounded weights, one column after the other, and refits their scales.

GPTQ decides each column once, before it knows how later columns are rounded. Afterwards every
column can be decided again in the light of all others: with the errors ``e = w - stored value`` of
a row and the second moment H of the inputs, the output's squared error ``e^T H e`` is least in
column j alone where the column is

    w_j + sum_{k != j} H[j, k] / H[j, j] * e_k

so its nearest grid point is the best one (coordinate descent, as in QuantEase, arXiv 2309.01885).
A group's scale is refitted before the group's columns, by least squares in the same measure. Each
step lowers the error or leaves it, so a few sweeps suffice.
"""

from __future__ import annotations

import torch

from quant.kernels.native import Columns
from quant.quantizers.grids import Grid


def descend(
    weight: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    sweeps: int,
    block: int,
) -> None:
    """Improves the codes of some rows, and the scales of their grid, in place.

    Args:
        weight: float32 ``[columns, rows]``, the original values.
        codes: uint8 ``[columns, rows]``.
        errors: float32 ``[columns, rows]``: ``weight - stored value``.
        hessian: float32 ``[columns, columns]``, symmetric, with a positive diagonal.
        grid: the grid of the codes.
        sweeps: how many times every column is decided again.
        block: columns that one matrix product serves; groups up to this size are refitted.
    """
    size = grid.group_size or len(weight)
    refits = size <= block
    step = size if refits else block
    for _ in range(sweeps):
        for start in range(0, len(weight), step):
            stop = min(start + step, len(weight))
            among = hessian[start:stop, start:stop]
            own, gradient = errors[start:stop], hessian[start:stop] @ errors
            if refits:
                change = grid.refit(start // size, codes[start:stop], gradient, among)
                own -= change
                gradient.addmm_(among, change, alpha=-1.0)
            diagonal = among.diagonal().unsqueeze(1)
            # The kernel adds the columns before each one itself, with their errors as they become.
            others = gradient.addmm_(among.tril(), own, alpha=-1.0).div_(diagonal)
            grid.round_columns(
                Columns(
                    others.add_(weight[start:stop]),
                    weight[start:stop],
                    among / diagonal,
                    torch.arange(start, stop),
                    codes,
                    own,
                )
            )
