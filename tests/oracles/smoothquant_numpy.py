"""SmoothQuant in NumPy, straight from the paper (arXiv 2211.10438), on the inputs themselves.

Equation 4: ``s_j = max|X_j| ** a / max|W_j| ** (1 - a)``; equation 3: ``Y = (X diag(s)^-1)
(diag(s) W)``. ``product`` multiplies what is rounded to 8 bits on both sides.
"""

from __future__ import annotations

import numpy as np


def factors(weight: np.ndarray, x: np.ndarray, alpha: float, ties: np.ndarray) -> np.ndarray:
    """By column of ``weight[out, in]`` and ``x[tokens, in]``; tied columns share their maxima."""
    out = np.empty(len(ties))
    for column, tie in enumerate(ties):
        own = ties == tie
        out[column] = np.abs(x[:, own]).max() ** alpha
        out[column] /= np.abs(weight[:, own]).max() ** (1 - alpha)
    return out


def weights_by_row(weight: np.ndarray) -> np.ndarray:
    """8 bits with one scale a row, by the largest."""
    scale = np.abs(weight).max(1, keepdims=True) / 127
    return np.rint(weight / scale) * scale


def inputs_by_token(x: np.ndarray) -> np.ndarray:
    """8 bits with a scale and a zero point a token, of a range that holds zero."""
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = (high - low) / 255
    zero = np.rint(-128 - low / scale)
    return (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale


def inputs_by_tensor(x: np.ndarray, largest: float) -> np.ndarray:
    """8 bits with one scale, by the largest that was seen."""
    scale = largest / 127
    return np.clip(np.rint(x / scale), -128, 127) * scale
