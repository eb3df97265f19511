"""Elementwise arithmetic, comparisons and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_broadcast
from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.coreml_interpreter.values import STORAGE
from device_harness.errors import DeviceError


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    def apply(x: Tensor, y: Tensor) -> Tensor:
        check_broadcast(x, y)
        return function(x, y)

    return apply


def _unary(function: Callable[[Tensor], Tensor]) -> Operation:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def floor_div(x: Tensor, y: Tensor) -> Tensor:
    """The quotient, rounded towards negative infinity."""
    check_broadcast(x, y)
    return torch.floor_divide(x, y)


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The values clipped to the range from ``alpha`` to ``beta``."""
    check_broadcast(x, alpha, beta)
    return torch.minimum(torch.maximum(x, alpha), beta)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """``1 / (x + epsilon)``."""
    return torch.reciprocal(x + epsilon)


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    """``ln(x + epsilon)``."""
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    """``1 / sqrt(x + epsilon)``."""
    return torch.rsqrt(x + epsilon)


def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    """The larger of ``x`` and ``alpha``."""
    check_broadcast(x, alpha)
    return torch.maximum(x, alpha)


def cast(x: Tensor, dtype: str) -> Tensor:
    """Casts to another type; floats are cut towards zero, and integers that do not fit wrap."""
    if dtype not in STORAGE:
        raise DeviceError(f"there is no cast to {dtype}; there are casts to {', '.join(STORAGE)}")
    if dtype in ("uint16", "uint32"):
        return x.to(torch.int64).bitwise_and((1 << int(dtype[4:])) - 1).to(STORAGE[dtype])
    if dtype != "bool" and x.is_floating_point() and not STORAGE[dtype].is_floating_point:
        return x.to(torch.int64).to(STORAGE[dtype])
    return x.to(STORAGE[dtype])


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where ``cond`` holds, ``b`` elsewhere."""
    check_broadcast(cond, a, b)
    return torch.where(cond, a, b)


OPS: Final[dict[str, Operation]] = {
    "abs": _unary(torch.abs),
    "acos": _unary(torch.acos),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "ceil": _unary(torch.ceil),
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "logical_not": _unary(torch.logical_not),
    "round": _unary(torch.round),
    "sign": _unary(torch.sign),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(torch.true_divide),
    "floor_div": floor_div,
    "mod": _binary(torch.remainder),
    "pow": _binary(torch.pow),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "clip": clip,
    "inverse": inverse,
    "log": log,
    "rsqrt": rsqrt,
    "threshold": threshold,
    "cast": cast,
    "select": select,
}
