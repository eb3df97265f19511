"""Recognises the two forms in which `exporters.coreml.norms` writes RMSNorm."""

from __future__ import annotations

from exporters.coreml.lifted_values import Part, number, operands
from exporters.lifted import Norm, Product, Sum, Value


def norm_of(name: str, scaled: Value, weight: Part) -> Norm | None:
    """The norm whose last operation is a product with its weight; None for anything else.

    Given::

        scaled = x * rsqrt(mean(x * x), epsilon)              # wide_rms_norm
        scaled = y * rsqrt(mean(y * y) + r * r), y = x / m, r = sqrt(epsilon) / m

    Result: ``Norm(x, weight, epsilon)``
    """
    if weight.values is None or not isinstance(scaled, Product):
        return None
    x, root = scaled.factors
    inner = operands(root, "rsqrt")
    if inner is None:
        root, x = scaled.factors
        inner = operands(root, "rsqrt")
    if inner is None:
        return None
    epsilon, total = number(inner[0]), inner[1]
    if epsilon is None:
        return None
    source: Value | None = x
    if isinstance(total, Sum):
        small = _small(total.terms[1], x)
        if small is None:
            return None
        source, added = small
        epsilon, total = epsilon + added, total.terms[0]
    mean = operands(total, "reduce_mean")
    if mean is None or source is None or not _is_square(mean[-1], x):
        return None
    return Norm(name, source, weight.weight, weight.values, epsilon)


def _is_square(value: Value, of: Value) -> bool:
    return isinstance(value, Product) and value.factors[0] is of and value.factors[1] is of


def _small(value: Value, y: Value) -> tuple[Value, float] | None:
    """What ``y`` was before it was divided, and the epsilon that was divided with it."""
    divided = operands(y, "real_div")
    if (
        divided is None
        or not isinstance(value, Product)
        or value.factors[0] is not value.factors[1]
    ):
        return None
    root = operands(value.factors[0], "real_div")
    if root is None or root[1] is not divided[1]:
        return None
    numerator = number(root[0])
    return None if numerator is None else (divided[0], numerator**2)
