"""GPTQ in NumPy, straight from the paper (arXiv 2210.17323), one column after the other.

Algorithm 1 without its blocks: the inverse Hessian's upper Cholesky factor is formed by inverting
the whole matrix, every column's error goes to all later columns at once, and the grid of a group is
found by trying every bfloat16 scale. All in float64.
"""

from __future__ import annotations

import numpy as np


def bfloat16_scales(low: float, high: float) -> np.ndarray:
    """Every bfloat16 number between two positive ones."""
    bits = np.array([low, high], np.float32).view(np.uint32) >> 16
    every = np.arange(bits[0], bits[1] + 1, dtype=np.uint32) << 16
    return every.view(np.float32).astype(np.float64)


def best_grid(
    values: np.ndarray, bits: int, symmetric: bool, signed: bool = False, grouped: bool = True
) -> tuple[float, float]:
    """The scale and zero point of least error for one group of one row.

    For 4 bits in groups, a weight's squared error counts as its magnitude and 0.375 times the
    largest magnitude say.

    Scales go up to where all values fit, and a little further: 20 % below 8 bits, 2.5 % at 8. At 2
    and 3 bits they go up to the widest value itself, and far down.
    """
    half, top = 2 ** (bits - 1), 2**bits - 1
    widest = 1.2 if bits < 8 else 1.025
    lowest = 1 / 2
    if bits < 4:
        widest, lowest = 1.01 * (half - 1 if symmetric else top), 1 / 64
    if symmetric:
        reach = np.abs(values).max()
        scales = bfloat16_scales(reach / 64 / half, widest * reach / (half - 1))
        if signed and bits == 4 and grouped:  # the largest weight's side gets the further step
            scales = -scales if values.max() > -values.min() else scales
        elif signed:
            scales = np.concatenate((scales, -scales))
        zeros = np.array([half])
    else:
        reach = max(values.max(), 0.0) - min(values.min(), 0.0)
        scales = bfloat16_scales(reach * lowest / top, widest * reach / top)
        zeros = np.arange(top + 1)
    scale, zero = (grid.reshape(-1, 1) for grid in np.meshgrid(scales, zeros, indexing="ij"))
    steps = np.clip(np.rint(values / scale), -zero, top - zero)
    magnitude = np.abs(values)
    importance = magnitude + 0.375 * magnitude.max() if bits == 4 and grouped else 1.0
    errors = (importance * (values - steps * scale) ** 2).sum(1)
    best = int(errors.argmin())
    return float(scale[best, 0]), float(zero[best, 0])


def order_and_factor(
    moment: np.ndarray, damping: float, activation_order: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The order of the columns, and the upper Cholesky factor of the inverse Hessian in it."""
    hessian, cols = 2 * moment.astype(np.float64), len(moment)
    hessian += damping * np.trace(hessian) / cols * np.eye(cols)
    order = np.argsort(-np.diag(moment), kind="stable") if activation_order else np.arange(cols)
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    return order, np.linalg.cholesky(inverse).T


def gptq_palette(
    weight: np.ndarray,
    moment: np.ndarray,
    tables: np.ndarray,
    *,
    damping: float,
    activation_order: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [rows, cols] into each row's table, [rows, entries], and the values they stand for."""
    order, factor = order_and_factor(moment, damping, activation_order)
    left, tables = weight.astype(np.float64)[:, order], tables.astype(np.float64)
    codes, values = np.zeros(weight.shape, int), np.zeros(weight.shape)
    for step, column in enumerate(order):
        away = np.abs(left[:, step, None] - tables)
        codes[:, column] = away.argmin(1)
        values[:, column] = np.take_along_axis(tables, away.argmin(1)[:, None], 1)[:, 0]
        error = (left[:, step] - values[:, column]) / factor[step, step]
        left[:, step + 1 :] -= np.outer(error, factor[step, step + 1 :])
    return codes, values


def gptq(
    weight: np.ndarray,
    moment: np.ndarray,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    damping: float,
    activation_order: bool,
    signed: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, cols], scales and zero points [rows, groups], and the values they stand for."""
    w = weight.astype(np.float64)
    rows, cols = w.shape
    order, factor = order_and_factor(moment, damping, activation_order)
    scales, zeros = np.zeros((rows, cols // group)), np.zeros((rows, cols // group))
    codes, values = np.zeros((rows, cols)), np.zeros((rows, cols))

    def find(index: int, columns: np.ndarray) -> None:
        for row in range(rows):
            found = best_grid(columns[row], bits, symmetric, signed, grouped=group < cols)
            scales[row, index], zeros[row, index] = found

    if activation_order:
        for index in range(cols // group):
            find(index, w[:, index * group : (index + 1) * group])
    left = w[:, order].copy()
    for step, column in enumerate(order):
        index = column // group
        if not activation_order and column % group == 0:
            find(index, left[:, column : column + group])
        scale, zero = scales[:, index], zeros[:, index]
        rounded = np.clip(np.rint(left[:, step] / scale), -zero, 2**bits - 1 - zero)
        codes[:, column], values[:, column] = rounded + zero, rounded * scale
        error = (left[:, step] - values[:, column]) / factor[step, step]
        left[:, step + 1 :] -= np.outer(error, factor[step, step + 1 :])
    return codes, scales, zeros, values
