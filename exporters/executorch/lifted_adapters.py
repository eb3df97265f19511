"""Lifts a product to which an adapter is added; see `exporters.executorch.adapters`."""

from __future__ import annotations

import re
from typing import Final

from exporters.executorch.lifted_values import operands
from exporters.lifted import Bias, Constant, Linear, Unknown, Value

_FACTOR: Final = re.compile(r"adapter ([^:]+): lora_([AB]) of (.+)")


def by_factor(name: str, source: Value, filter: Constant) -> Value | None:
    """A product with an adapter's factor; None where the constant is another."""
    if _FACTOR.fullmatch(filter.name) is None:
        return None
    return Unknown(name, "factor", (source, filter))


def adapted(product: Value, change: Value) -> Value | None:
    """A product whose adapter's change is added to it: as the base computes it, without the change.

    Returns:
        The product; None where the sum is another one, or the factors are of another weight.
    """
    linear = product.source if isinstance(product, Bias) else product
    up = operands(change, "factor")
    down = None if up is None else operands(up[0], "factor")
    if not isinstance(linear, Linear) or up is None or down is None:
        return None
    told = [_FACTOR.fullmatch(each[1].name) for each in (down, up)]
    adapters = {each[1] for each in told if each is not None}
    parts = [(each[2], each[3]) for each in told if each is not None]
    weight = linear.weight.name
    own = parts == [("A", weight), ("B", weight)] and len(adapters) == 1
    return product if own and down[0] is linear.source else None
