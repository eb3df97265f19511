"""Recognises attention with bounded scores, which is a part of a delegate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporters.executorch.lifted_forms import tanh_of
from exporters.executorch.lifted_values import LastRows, Repeated, Updated, operands
from exporters.lifted import (
    Array,
    Attention,
    Cache,
    Last,
    Numbers,
    Scaled,
    Sum,
    Value,
)

Seen = dict[tuple[int, ...], tuple[Array, ...]]


@dataclass(frozen=True, eq=False)
class Turned(Value):
    """Queries, keys or values with heads before tokens.

    Attributes:
        source: what was turned, with tokens before heads.
        heads: the number of heads.
        width: the width of a head.
    """

    source: Value
    heads: int
    width: int


@dataclass(frozen=True, eq=False)
class Mixed(Value):
    """Attention's result with heads before tokens."""

    attention: Value


def turned(name: str, source: Value, order: tuple[int, ...], dims: tuple[int, ...]) -> Value | None:
    """A permutation that exchanges tokens and heads of ``dims``; None for another."""
    if order != (0, 2, 1, 3):
        return None
    if isinstance(source, Mixed):
        return source.attention
    return Turned(name, source, dims[2], dims[3])


def mixed(name: str, weights: Value, values: Value, seen: Seen) -> Value | None:
    """Attention, of ``softmax(cap * tanh(q @ k.T * (scale / cap)) + mask) @ v``.

    Args:
        name: the value's name.
        weights: the first operand of the product.
        values: the second one.
        seen: what tokens see of caches, found before, by what it was made of.
    """
    shown = operands(weights, "XNNSoftmax")
    if shown is None or not isinstance(shown[0], Sum) or not isinstance(values, Turned):
        return None
    bounded, mask = shown[0].terms
    if not isinstance(bounded, Scaled):
        return None
    bent = tanh_of(bounded.source)
    product = None if bent is None else operands(bent, "scores")
    if product is None:
        return None
    scaled, keys = product
    if not (isinstance(scaled, Scaled) and isinstance(keys, Turned)):
        return None
    queries = scaled.source
    if not isinstance(queries, Turned) or queries.heads % keys.heads:
        return None
    heads = queries.heads, keys.heads, queries.width
    if {(each.heads, each.width) for each in (keys, values)} != {heads[1:]}:
        return None
    query, tokens, groups = queries.source, 0, heads[0] // heads[1]
    if isinstance(mask, Repeated):
        groups, mask = groups // mask.times, mask.source
    if isinstance(mask, LastRows):
        tokens, mask = mask.tokens, mask.source
        if not isinstance(query, Last) or query.positions != tokens:
            return None
        query = query.source
    if groups != 1 and tokens != 1:
        return None  # some heads would get the rows of other tokens
    key, value, cap = keys.source, values.source, bounded.factor
    if not (isinstance(key, Updated) and isinstance(value, Updated) and key.first == value.first):
        return None
    visible = _visible(mask, key, seen)
    if visible is None:
        return None
    held_keys, held_values = (
        Cache(each.old.name, each.old.name, each.old.length, each.rows) for each in (key, value)
    )
    scale = scaled.factor * cap
    found: Value = Attention(
        name, query, key.new, value.new, heads, scale, held_keys, held_values, visible, cap
    )
    return Mixed(name, Last(name, found, tokens) if tokens else found)


def _visible(mask: Value, keys: Updated, seen: Seen) -> tuple[Array, ...] | None:
    """Which tokens of the whole cache each new token sees, for each probe."""
    if not isinstance(mask, Numbers):
        return None
    key = id(mask), *keys.first
    if key not in seen:
        found = []
        for i, rows in enumerate(keys.rows):
            shown = np.zeros((len(rows), rows[-1] + 1), bool)
            width = shown.shape[1] - keys.first[i]
            near = mask.arrays[i] > -1.0
            if near.shape != (len(rows), width):
                return None
            shown[:, keys.first[i] :] = near
            found.append(shown)
        seen[key] = tuple(found)
    return seen[key]
