"""Lifts a product to which an adapter is added; see `exporters.coreml.adapters`."""

from __future__ import annotations

from exporters.coreml.names import LORA_A, LORA_B, factor_name
from exporters.lifted import Array, Bias, Constant, Linear, Unknown, Value


def adapted(pair: tuple[Value, Value]) -> Value | None:
    """A product whose adapter's change is added to it: as the base computes it, without the change.

    Returns:
        The product; None where the sum is another one, or the factors are of another weight.
    """
    for product, change in (pair, pair[::-1]):
        linear = product.source if isinstance(product, Bias) else product
        if not isinstance(linear, Linear):
            continue
        up = _by_factor(change, linear.weight.name, LORA_B)
        down = None if up is None else _by_factor(up[0], linear.weight.name, LORA_A)
        if up is None or down is None:
            continue
        if down[0] is linear.source and down[1].shape[0] == up[1].shape[1]:
            return product
    return None


def is_by_factor(value: Value) -> bool:
    """Whether a value is a product with an adapter's factor."""
    if not isinstance(value, Unknown) or value.kind != "linear" or not value.operands:
        return False
    factor = value.operands[0]
    return isinstance(factor, Constant) and factor.name.endswith((LORA_A, LORA_B))


def _by_factor(value: Value, weight: str, suffix: str) -> tuple[Value, Array] | None:
    """What is multiplied by one of the factors of a weight, and the factor."""
    if not is_by_factor(value):
        return None
    assert isinstance(value, Unknown)
    factor, source = value.operands
    assert isinstance(factor, Constant)
    return (source, factor.array) if factor.name == factor_name(weight, suffix) else None
