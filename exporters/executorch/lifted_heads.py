"""Recognises the permutations between a row for each slot of a token and heads outermost.

`exporters.executorch.slots` writes them, in delegates.
"""

from __future__ import annotations

from dataclasses import dataclass

from exporters.lifted import Attention, Last, Value
from exporters.lifted_mixture import Slots


@dataclass(frozen=True, eq=False)
class SlotRows(Value):
    """What each token's experts computed, a row for each slot: ``float[1, t * k, heads * d]``.

    Attributes:
        weights: each token's weight of each expert.
        terms: the column of ``weights``, and the result, in the file's order.
        chosen: how many slots a token has.
    """

    weights: Value
    terms: tuple[tuple[int, Value], ...]
    chosen: int


@dataclass(frozen=True, eq=False)
class SlotsApart(Value):
    """What attention gives, a row for each slot of a token.

    Attributes:
        source: what attention gives, with heads outermost.
        chosen: how many slots a token has.
        heads: how many heads a slot has.
    """

    source: Value
    chosen: int
    heads: int


def permuted(
    name: str, source: Value, order: tuple[int, ...], dims: tuple[int, ...]
) -> Value | None:
    """Slots with heads before them, or the other way round; None for another permutation.

    Args:
        name: the value's name.
        source: what is permuted.
        order: the permutation.
        dims: the source's shape, for the largest number of tokens.
    """
    if order != (0, 2, 1, 3):
        return None
    if isinstance(source, SlotRows):
        same = dims[1] == source.chosen
        return Slots(name, source.weights, source.terms, dims[1], dims[2]) if same else None
    attention = source.source if isinstance(source, Last) else source
    if not isinstance(attention, Attention):
        return None
    _, heads, chosen, width = dims
    own = (heads * chosen, width) == (attention.heads[0], attention.heads[2])
    return SlotsApart(name, source, chosen, heads) if own else None
