"""Recognises what a delegate computes step by step: norms, functions, bounds, rotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from exporters.executorch.lifted_values import Part, TableRows, operands
from exporters.lifted import (
    Array,
    Bias,
    Columns,
    Constant,
    Gelu,
    LayerNorm,
    Norm,
    Product,
    Rope,
    Scaled,
    Sigmoid,
    Silu,
    Softcap,
    Sum,
    Value,
)
from exporters.lifted_recurrent import (
    Function,
    Gain,
    UnitNorm,
)

_CUBIC = 0.044715  # of GELU's form with a tanh


def times(name: str, one: Value, other: Value, widths: Mapping[int, int]) -> Value | None:
    """What ``one * other`` is, in this order; None for a plain product.

    Args:
        name: the value's name.
        one: the first operand.
        other: the second one.
        widths: the width of what norms normalise, by the norm's id.
    """
    number = _number(other)
    if number is not None:
        return _softcap(name, one, number) or Scaled(name, one, number)
    if isinstance(other, Sigmoid) and other.source is one:
        return Silu(name, one)
    if isinstance(other, Part):
        return _weighted(name, one, other, widths)
    if operands(other, "XNNReciprocalSquareRoot") is not None:
        return _centred(name, one, other) or _unit(name, one, other)
    return Gelu(name, one, tanh=True) if _is_tanh_gate(one, other) else None


def plus(name: str, one: Value, other: Value) -> Value | None:
    """What ``one + other`` is, in this order; None for a plain sum."""
    above = operands(one, "XNNMaximum")
    if above is not None and _is_softplus(one, other, above[0]):
        return Function(name, above[0], "softplus")
    if not isinstance(other, Part) or other.values is None:
        return None
    if isinstance(one, LayerNorm) and one.bias is None:
        return replace(one, name=name, bias=other.weight, shift=other.values)
    return Bias(name, one, other.weight, other.values)


def _number(value: Value) -> float | None:
    if isinstance(value, Constant) and value.array.shape == (1,):
        return float(value.array[0])
    return None


def tanh_of(value: Value) -> Value | None:
    """What a value is the tanh of; None for another value."""
    return value.source if isinstance(value, Function) and value.function == "tanh" else None


def _softcap(name: str, bent: Value, cap: float) -> Softcap | None:
    """``cap * tanh(x * (1 / cap))``."""
    inner = tanh_of(bent)
    if not isinstance(inner, Scaled) or not cap:
        return None
    if np.float32(inner.factor) != np.float32(1 / cap):
        return None
    return Softcap(name, inner.source, cap)


def _weighted(name: str, scaled: Value, weight: Part, widths: Mapping[int, int]) -> Value | None:
    """``x * rsqrt(mean(x * x) + epsilon) * weight``, LayerNorm with its scale, or a gain.

    A weight that is wider than what a LayerNorm normalises is no scale of the norm.
    """
    values = weight.values
    if values is None:
        return None
    bare = isinstance(scaled, LayerNorm) and scaled.weight is None and scaled.bias is None
    if isinstance(scaled, LayerNorm) and bare and widths.get(id(scaled)) == values.shape[-1]:
        return replace(scaled, name=name, weight=weight.weight, values=values)
    if isinstance(scaled, Product):
        x, root = scaled.factors
        epsilon = _epsilon(x, root, "mean")
        if epsilon is not None:
            return Norm(name, x, weight.weight, values, epsilon)
    return Gain(name, scaled, weight.weight, values)


def _unit(name: str, x: Value, root: Value) -> UnitNorm | None:
    """``x * rsqrt(sum(x * x) + epsilon)``."""
    epsilon = _epsilon(x, root, "sum")
    return None if epsilon is None else UnitNorm(name, x, epsilon)


def _centred(name: str, x: Value, root: Value) -> LayerNorm | None:
    """``(x - mean(x)) * rsqrt(variance + epsilon)``: a LayerNorm without a scale and a shift."""
    pair, epsilon = operands(x, "difference"), _epsilon(x, root, "mean")
    if pair is None or epsilon is None:
        return None
    mean = operands(pair[1], "mean")
    if mean is None or mean[0] is not pair[0]:
        return None
    return LayerNorm(name, pair[0], None, None, None, None, epsilon)


def _epsilon(x: Value, root: Value, kind: str) -> float | None:
    """The epsilon of ``rsqrt(kind(x * x) + epsilon)``; None for another value."""
    spread = operands(root, "XNNReciprocalSquareRoot")
    if spread is None or not isinstance(spread[0], Sum):
        return None
    inside, small = operands(spread[0].terms[0], kind), _number(spread[0].terms[1])
    if inside is None or small is None:
        return None
    square = inside[0]
    if not isinstance(square, Product) or any(factor is not x for factor in square.factors):
        return None
    return small


def _is_tanh_gate(x: Value, gate: Value) -> bool:
    """Whether a value is ``0.5 * tanh(x * (root * cubic * x * x + root)) + 0.5``."""
    half = _shifted(gate, 0.5)
    if half is None or not isinstance(half, Scaled) or half.factor != 0.5:
        return False
    bent = tanh_of(half.source)
    if not isinstance(bent, Product) or bent.factors[0] is not x:
        return False
    root = math.sqrt(2 / math.pi)
    cubic = _shifted(bent.factors[1], root)
    if not isinstance(cubic, Scaled) or np.float32(cubic.factor) != np.float32(root * _CUBIC):
        return False
    square = cubic.source
    return isinstance(square, Product) and all(factor is x for factor in square.factors)


def _is_softplus(one: Value, other: Value, x: Value) -> bool:
    """Whether ``one + other`` is ``log(1 + exp(x))``: it is computed for samples of ``x``."""
    samples = np.linspace(-40, 40, 641)
    parts = [_computed(part, x, samples) for part in (one, other)]
    if parts[0] is None or parts[1] is None:
        return False
    return bool(np.allclose(parts[0] + parts[1], np.logaddexp(0, samples), rtol=1e-6, atol=0))


def _computed(value: Value, x: Value, samples: Array) -> Array | None:
    """What steps without a weight make of samples of ``x``; None where there are others."""
    if value is x:
        return samples
    if _number(value) is not None:
        return np.asarray(_number(value))
    if isinstance(value, Function) and value.function == "exp":
        inner = _computed(value.source, x, samples)
        return None if inner is None else np.exp(inner)
    if isinstance(value, Scaled):
        inner = _computed(value.source, x, samples)
        return None if inner is None else inner * value.factor
    for kind, compute in _STEPS.items():
        given = operands(value, kind)
        if isinstance(value, Sum | Product) and kind == type(value).__name__:
            given = value.terms if isinstance(value, Sum) else value.factors
        if given is not None:
            made = [_computed(each, x, samples) for each in given]
            return None if any(each is None for each in made) else compute(*made)
    return None


_STEPS: Final[Mapping[str, Callable[..., Array]]] = {
    "Sum": np.add,
    "Product": np.multiply,
    "XNNDiv": np.divide,
    "XNNMaximum": np.maximum,
    "XNNNegate": np.negative,
    "XNNAbs": np.abs,
}


def _shifted(value: Value, number: float) -> Value | None:
    """``x`` of ``x + number``; None for another value."""
    if not isinstance(value, Sum):
        return None
    added = _number(value.terms[1])
    same = added is not None and np.float32(added) == np.float32(number)
    return value.terms[0] if same else None


def rotated(name: str, parts: Sequence[Value]) -> Value | None:
    """``[first * cos - second * sin, second * cos + first * sin]``, and columns behind them."""
    low, high = operands(parts[0], "difference"), parts[1]
    if low is None or not isinstance(high, Sum):
        return None
    terms = [_by_rows(term) for term in (*low, *high.terms)]
    if any(term is None for term in terms):
        return None
    (a, cos), (b, sin), (c, cos_again), (d, sin_again) = (term for term in terms if term)
    if not (isinstance(a, Columns) and isinstance(b, Columns) and a.source is b.source):
        return None
    half = cos.table.shape[1]
    same = _same(a, d) and _same(b, c) and cos is cos_again and sin is sin_again
    halves = (a.start, a.stop, b.start, b.stop) == (0, half, half, 2 * half)
    if not same or not halves or cos.rows != sin.rows:
        return None
    for rest in parts[2:]:
        if not isinstance(rest, Columns) or rest.source is not a.source:
            return None
        if rest.start != 2 * half:
            return None
    return Rope(name, a.source, cos.table, sin.table, cos.rows)


def _same(one: Value, other: Value) -> bool:
    return one is other


def _by_rows(term: Value) -> tuple[Value, TableRows] | None:
    if not isinstance(term, Product) or not isinstance(term.factors[1], TableRows):
        return None
    return term.factors[0], term.factors[1]
