"""Recognises what a delegate's products with matrices are: of a whole weight, or of its parts."""

from __future__ import annotations

import numpy as np

from exporters.executorch.lifted_adapters import by_factor
from exporters.executorch.lifted_values import Grouped, operands
from exporters.lifted import Constant, Linear, Product, Unknown, Value


def by_constant(name: str, source: Value, filter: Constant) -> Value | None:
    """A mean, a sum, columns that are selected, or a product with values of such columns."""
    values, key = filter.array, filter.name
    if values.shape[0] == 1 and np.all(values == np.float32(1 / values.shape[1])):
        return Unknown(name, "mean", (source,))
    if values.shape[0] == 1 and np.all(values == 1):
        return Unknown(name, "sum", (source,))
    if key.startswith("float columns of "):
        places = values.argmax(1)
        chosen = np.zeros_like(values)
        chosen[np.arange(len(places)), places] = 1
        if np.array_equal(chosen, values):
            return Unknown(name, "chosen", (source, Constant(key, places)))
    if key.startswith("float values of "):
        weight = Constant(key.removeprefix("float values of "), values)
        return Unknown(name, "exact", (source, weight))
    return by_factor(name, source, filter)


def whole(part: Grouped) -> Value:
    """The product with a whole weight, when all of its groups are there."""
    if sorted(part.groups) != list(range(part.weight.format.groups)):
        return part
    return Linear(part.name, part.source, part.weight, "float32")


def parted(name: str, rounded: Value, added: Value) -> Value | None:
    """A product of which some columns are multiplied apart."""
    exact = operands(added, "exact")
    if not isinstance(rounded, Linear) or exact is None:
        return None
    chosen, rest = operands(exact[0], "chosen"), rounded.source
    if chosen is None or not isinstance(rest, Product):
        return None
    source, columns = chosen
    mask = rest.factors[1]
    if not isinstance(mask, Constant) or not isinstance(columns, Constant):
        return None
    kept = tuple(map(int, columns.array))
    others = tuple(map(int, np.flatnonzero(mask.array == 0))) == kept
    own = exact[1].name == rounded.weight.name and rest.factors[0] is source
    if not (others and own and set(mask.array.ravel().tolist()) <= {0.0, 1.0}):
        return None
    return Linear(name, source, rounded.weight, rounded.precision, kept)
