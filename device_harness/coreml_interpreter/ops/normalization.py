"""Normalizations."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Ints, Operation


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalizes ``x [n, C, ...]`` by a given mean and variance of each channel."""
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon)


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Normalizes each channel of ``x [n, C, ...]`` by its own mean and variance."""
    axes = tuple(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    scaled = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)
    shape = (-1, *[1] * (x.dim() - 2))
    if gamma is not None:
        scaled = scaled * gamma.reshape(shape)
    return scaled if beta is None else scaled + beta.reshape(shape)


def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalizes ``x`` by its mean and variance over ``axes``.

    ``gamma`` and ``beta`` have the sizes of those dimensions.
    """
    dims = tuple(range(x.dim())) if axes is None else tuple(axis % x.dim() for axis in axes)
    centred = x - x.mean(dims, keepdim=True)
    scaled = centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + epsilon)
    shape = [size if dim in dims else 1 for dim, size in enumerate(x.shape)]
    if gamma is not None:
        scaled = scaled * gamma.reshape(shape)
    return scaled if beta is None else scaled + beta.reshape(shape)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``x`` divided by the root of the sum of squares over its last three dimensions."""
    return x * torch.rsqrt((x * x).sum((-3, -2, -1), keepdim=True) + epsilon)


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Normalizes ``x [n, C, ...]`` by the squares of ``size`` neighbouring channels."""
    return F.local_response_norm(x, size, alpha, beta, k)


OPS: Final[dict[str, Operation]] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "l2_norm": l2_norm,
    "local_response_norm": local_response_norm,
}
