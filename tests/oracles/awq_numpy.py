"""AWQ in NumPy, straight from the paper (arXiv 2306.00978), on the inputs themselves.

``s = magnitude ** alpha`` over a grid of alpha; each candidate is judged by the output of
``Q(W diag(s)) diag(s)^-1 X`` against ``W X``, where Q rounds by the best bfloat16 scale of every
group, found by trying all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BestGrid = Callable[[np.ndarray, int, bool], tuple[float, float]]


def rounded(weight: np.ndarray, bits: int, group: int, best_grid: BestGrid) -> np.ndarray:
    """Symmetric rounding, group by group."""
    out, half = np.empty_like(weight), 2 ** (bits - 1)
    for row in range(weight.shape[0]):
        for at in range(0, weight.shape[1], group):
            values = weight[row, at : at + group]
            scale, _ = best_grid(values, bits, True)
            out[row, at : at + group] = np.clip(np.rint(values / scale), -half, half - 1) * scale
    return out


def column_factors(
    weight: np.ndarray,
    x: np.ndarray,
    ties: np.ndarray,
    *,
    bits: int,
    group: int,
    exponents: int,
    best_grid: BestGrid,
) -> tuple[np.ndarray, float]:
    """The best factors and the squared error of the output that they leave."""
    squares = np.array([(x[:, ties == tie] ** 2).mean() for tie in ties])
    magnitude = np.sqrt(squares)
    best, chosen = np.inf, np.ones(len(ties))
    for step in range(exponents):
        factors = magnitude ** (step / exponents)
        factors /= np.sqrt(factors.max() * factors.min())
        found = rounded(weight * factors, bits, group, best_grid) / factors
        loss = (((found - weight) @ x.T) ** 2).sum()
        if loss < best:
            best, chosen = loss, factors
    return chosen, best
