"""Recognises norms, activation functions and bounds in what a delegate computes step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from exporters.executorch.lifted_values import Part, operands
from exporters.lifted import (
    Bias,
    Constant,
    Gelu,
    LayerNorm,
    Norm,
    Product,
    Scaled,
    Sigmoid,
    Silu,
    Softcap,
    Sum,
    Value,
)

_CUBIC = 0.044715  # of GELU's form with a tanh


def times(name: str, one: Value, other: Value) -> Value | None:
    """What ``one * other`` is, in this order; None for a plain product."""
    number = _number(other)
    if number is not None:
        return _softcap(name, one, number) or Scaled(name, one, number)
    if isinstance(other, Sigmoid) and other.source is one:
        return Silu(name, one)
    if isinstance(other, Part):
        return _weighted(name, one, other)
    if operands(other, "XNNReciprocalSquareRoot") is not None:
        return _centred(name, one, other)
    return Gelu(name, one, tanh=True) if _is_tanh_gate(one, other) else None


def plus(name: str, one: Value, other: Value) -> Value | None:
    """What ``one + other`` is, in this order; None for a plain sum."""
    if not isinstance(other, Part) or other.values is None:
        return None
    if isinstance(one, LayerNorm) and one.bias is None:
        return replace(one, name=name, bias=other.weight, shift=other.values)
    return Bias(name, one, other.weight, other.values)


def _number(value: Value) -> float | None:
    if isinstance(value, Constant) and value.array.shape == (1,):
        return float(value.array[0])
    return None


def _softcap(name: str, bent: Value, cap: float) -> Softcap | None:
    """``cap * tanh(x * (1 / cap))``."""
    inside = operands(bent, "XNNTanh")
    if inside is None or not isinstance(inside[0], Scaled) or not cap:
        return None
    inner = inside[0]
    if np.float32(inner.factor) != np.float32(1 / cap):
        return None
    return Softcap(name, inner.source, cap)


def _weighted(name: str, scaled: Value, weight: Part) -> Value | None:
    """``x * rsqrt(mean(x * x) + epsilon) * weight``, or LayerNorm with its scale."""
    if weight.values is None:
        return None
    if isinstance(scaled, LayerNorm) and scaled.weight is None and scaled.bias is None:
        return replace(scaled, name=name, weight=weight.weight, values=weight.values)
    if not isinstance(scaled, Product):
        return None
    x, root = scaled.factors
    epsilon = _epsilon(x, root)
    return None if epsilon is None else Norm(name, x, weight.weight, weight.values, epsilon)


def _centred(name: str, x: Value, root: Value) -> LayerNorm | None:
    """``(x - mean(x)) * rsqrt(variance + epsilon)``: a LayerNorm without a scale and a shift."""
    pair, epsilon = operands(x, "difference"), _epsilon(x, root)
    if pair is None or epsilon is None:
        return None
    mean = operands(pair[1], "mean")
    if mean is None or mean[0] is not pair[0]:
        return None
    return LayerNorm(name, pair[0], None, None, None, None, epsilon)


def _epsilon(x: Value, root: Value) -> float | None:
    """The epsilon of ``rsqrt(mean(x * x) + epsilon)``; None for another value."""
    spread = operands(root, "XNNReciprocalSquareRoot")
    if spread is None or not isinstance(spread[0], Sum):
        return None
    mean, small = operands(spread[0].terms[0], "mean"), _number(spread[0].terms[1])
    if mean is None or small is None:
        return None
    square = mean[0]
    if not isinstance(square, Product) or any(factor is not x for factor in square.factors):
        return None
    return small


def _is_tanh_gate(x: Value, gate: Value) -> bool:
    """Whether a value is ``0.5 * tanh(x * (root * cubic * x * x + root)) + 0.5``."""
    half = _shifted(gate, 0.5)
    if half is None or not isinstance(half, Scaled) or half.factor != 0.5:
        return False
    bent = operands(half.source, "XNNTanh")
    if bent is None or not isinstance(bent[0], Product) or bent[0].factors[0] is not x:
        return False
    root = math.sqrt(2 / math.pi)
    cubic = _shifted(bent[0].factors[1], root)
    if not isinstance(cubic, Scaled) or np.float32(cubic.factor) != np.float32(root * _CUBIC):
        return False
    square = cubic.source
    return isinstance(square, Product) and all(factor is x for factor in square.factors)


def _shifted(value: Value, number: float) -> Value | None:
    """``x`` of ``x + number``; None for another value."""
    if not isinstance(value, Sum):
        return None
    added = _number(value.terms[1])
    same = added is not None and np.float32(added) == np.float32(number)
    return value.terms[0] if same else None
