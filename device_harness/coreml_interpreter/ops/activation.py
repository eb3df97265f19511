"""Activation functions and softmax."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.errors import DeviceError

_GELU_MODES: Final = ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``."""
    return F.relu(x)


def relu6(x: Tensor) -> Tensor:
    """``min(max(x, 0), 6)``."""
    return F.relu6(x)


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``."""
    return torch.sigmoid(x)


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return F.silu(x)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """The Gaussian error linear unit, exact or in one of two approximations."""
    if mode not in _GELU_MODES:
        raise DeviceError(f"gelu has no mode {mode}; it has {', '.join(_GELU_MODES)}")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def softplus(x: Tensor) -> Tensor:
    """``ln(1 + exp(x))``."""
    return torch.logaddexp(x, torch.zeros(()))


def softsign(x: Tensor) -> Tensor:
    """``x / (1 + |x|)``."""
    return F.softsign(x)


def elu(x: Tensor, alpha: float) -> Tensor:
    """``x`` where it is positive, ``alpha * (exp(x) - 1)`` elsewhere."""
    return F.elu(x, alpha)


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """``x`` where it is positive, ``alpha * x`` elsewhere."""
    return F.leaky_relu(x, alpha)


def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta``."""
    return alpha * x + beta


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``leaky_relu`` with the slope ``alpha``, at most ``beta``."""
    return F.leaky_relu(x, alpha).clamp(max=beta)


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * tanh(beta * x)``."""
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``min(max(alpha * x + beta, 0), 1)``."""
    return (alpha * x + beta).clamp(0, 1)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """``x`` where it is at least ``alpha``, 0 elsewhere."""
    return torch.where(x >= alpha, x, torch.zeros(()))


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """``leaky_relu`` with one slope for each channel: ``alpha [C]``, ``x [n, C, ...]``."""
    return torch.where(x > 0, x, x * _of_channels(alpha, x))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha * ln(1 + exp(beta * x))``: ``alpha [C]``, ``beta [C]``, ``x [n, C, ...]``."""
    return _of_channels(alpha, x) * softplus(_of_channels(beta, x) * x)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """The exponentials divided by their sum along ``axis``."""
    return torch.softmax(x, axis)


def _of_channels(factors: Tensor, x: Tensor) -> Tensor:
    return factors.reshape(-1, *[1] * (x.dim() - 2))


OPS: Final[dict[str, Operation]] = {
    "relu": relu,
    "relu6": relu6,
    "sigmoid": sigmoid,
    "silu": silu,
    "gelu": gelu,
    "softplus": softplus,
    "softsign": softsign,
    "elu": elu,
    "leaky_relu": leaky_relu,
    "linear_activation": linear_activation,
    "clamped_relu": clamped_relu,
    "scaled_tanh": scaled_tanh,
    "sigmoid_hard": sigmoid_hard,
    "thresholded_relu": thresholded_relu,
    "prelu": prelu,
    "softplus_parametric": softplus_parametric,
    "softmax": softmax,
}
