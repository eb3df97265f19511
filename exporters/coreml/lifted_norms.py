"""Recognises the forms in which `exporters.coreml.norms` writes RMSNorm and LayerNorm."""

from __future__ import annotations

from dataclasses import replace

from exporters.coreml.lifted_values import Part, number, operands, whole_numbers
from exporters.lifted import (
    LayerNorm,
    Norm,
    Product,
    Scaled,
    Sum,
    Value,
)
from exporters.lifted_recurrent import (
    UnitNorm,
)


def norm_of(name: str, scaled: Value, weight: Part) -> Norm | None:
    """The norm whose last operation is a product with its weight; None for anything else.

    Given::

        scaled = x * rsqrt(mean(x * x), epsilon)              # wide_rms_norm
        scaled = y * rsqrt(mean(y * y) + r * r), y = x / m, r = sqrt(epsilon) / m

    Result: ``Norm(x, weight, epsilon)``
    """
    found = _over_root(scaled.factors) if isinstance(scaled, Product) else None
    if weight.values is None or found is None:
        return None
    y, epsilon, divisor = found
    source = y if divisor is None else _dividend(y, divisor)
    if source is None:
        return None
    return Norm(name, source, weight.weight, weight.values, epsilon)


def layer_norm_of(name: str, pair: tuple[Value, Value]) -> LayerNorm | None:
    """The LayerNorm, yet without scale and shift, that a product is; None for anything else.

    Given::

        c * rsqrt(mean(c * c), epsilon), c = x - mean(x)           # wide_layer_norm
        z * rsqrt(mean(z * z) + r * r), z = y - mean(y), y = (h - mean(h)) / m, h = x / 2,
            r = sqrt(epsilon) / 2 / m                              # scaled_layer_norm

    Result: ``LayerNorm(x, epsilon)``
    """
    found = _over_root(pair)
    if found is None:
        return None
    y, epsilon, divisor = found
    source = _uncentred(y)
    if divisor is not None and source is not None:
        inner = _dividend(source, divisor)
        half = None if inner is None else _uncentred(inner)
        source = half.source if isinstance(half, Scaled) and half.factor == 0.5 else None
        epsilon *= 4
    return None if source is None else LayerNorm(name, source, None, None, None, None, epsilon)


def unit_norm_of(name: str, pair: tuple[Value, Value]) -> UnitNorm | None:
    """``x * rsqrt(sum(x * x), epsilon)``; None for another product."""
    for x, root in (pair, pair[::-1]):
        inner = operands(root, "rsqrt")
        epsilon = None if inner is None else number(inner[0])
        total = None if inner is None else operands(inner[1], "reduce_sum")
        if total is None or epsilon is None:
            continue
        if whole_numbers(total[0]) == (-1,) and number(total[1]) and _is_square(total[2], x):
            return UnitNorm(name, x, epsilon)
    return None


def scaled_by(name: str, norm: LayerNorm, weight: Part) -> LayerNorm | None:
    """A LayerNorm with its scale; None where it has a scale or a shift already."""
    if norm.values is not None or norm.shift is not None or weight.values is None:
        return None
    return replace(norm, name=name, weight=weight.weight, values=weight.values)


def shifted_by(name: str, norm: LayerNorm, bias: Part) -> LayerNorm | None:
    """A LayerNorm with its shift; None where it has one already."""
    if norm.shift is not None or bias.values is None:
        return None
    return replace(norm, name=name, bias=bias.weight, shift=bias.values)


def _over_root(pair: tuple[Value, Value]) -> tuple[Value, float, Value | None] | None:
    """What is multiplied by the inverse root of its mean square.

    Returns:
        It, the epsilon, and the divisor that it and the epsilon's root were divided by, if any.
    """
    for y, root in (pair, pair[::-1]):
        inner = operands(root, "rsqrt")
        epsilon = None if inner is None else number(inner[0])
        if inner is None or epsilon is None:
            continue
        total, divisor = inner[1], None
        if isinstance(total, Sum):
            small = _small(total.terms[1])
            if small is None:
                continue
            epsilon, divisor, total = epsilon + small[0], small[1], total.terms[0]
        mean = operands(total, "reduce_mean")
        if mean is not None and _is_square(mean[-1], y):
            return y, epsilon, divisor
    return None


def _uncentred(value: Value) -> Value | None:
    """What a value was before its mean was subtracted."""
    parts = operands(value, "sub")
    mean = None if parts is None else operands(parts[1], "reduce_mean")
    return parts[0] if parts is not None and mean is not None and mean[-1] is parts[0] else None


def _dividend(value: Value, divisor: Value) -> Value | None:
    """What was divided by a divisor."""
    parts = operands(value, "real_div")
    return parts[0] if parts is not None and parts[1] is divisor else None


def _is_square(value: Value, of: Value) -> bool:
    return isinstance(value, Product) and value.factors[0] is of and value.factors[1] is of


def _small(value: Value) -> tuple[float, Value] | None:
    """An epsilon that is the square of a number by a divisor, before the division; the divisor."""
    if not isinstance(value, Product) or value.factors[0] is not value.factors[1]:
        return None
    root = operands(value.factors[0], "real_div")
    numerator = None if root is None else number(root[0])
    return None if root is None or numerator is None else (numerator**2, root[1])
