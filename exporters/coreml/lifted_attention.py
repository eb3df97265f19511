"""Recognises the forms in which `exporters.coreml.attention` writes rotations and attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from exporters.coreml.lifted_values import (
    Held,
    Swapped,
    TableRows,
    Updated,
    Walk,
    cache_label,
    function_operand,
    number,
    operands,
    whole_numbers,
)
from exporters.lifted import (
    NO_NEW_ROWS,
    Array,
    Attention,
    Cache,
    Columns,
    Constant,
    Numbers,
    Product,
    Rope,
    Scaled,
    Sum,
    Unknown,
    Value,
    row_numbers,
)

Given = Mapping[str, tuple[Value, ...]]
Made = tuple[Value, ...] | None


def table_rows(walk: Walk, name: str, table: Constant, rows: Numbers) -> Made:
    """Rows that are gathered from a constant for some positions."""
    return (TableRows(name, table.array, row_numbers(rows, len(walk.probes))),)


def scaled_rows(name: str, pair: tuple[Value, Value]) -> Made:
    """Rows of a table that are multiplied by -1."""
    for one, other in (pair, pair[::-1]):
        if isinstance(one, TableRows) and number(other) == -1.0:
            signs = tuple(-sign for sign in one.signs)
            return (TableRows(name, one.table, one.rows, signs),)
    return None


def joined(name: str, values: tuple[Value, ...]) -> Made:
    """What is concatenated: rows of a table twice, halves that changed places, a rotated head."""
    if len(values) != 2:
        return None
    first, second = values
    if isinstance(first, TableRows) and isinstance(second, TableRows):
        if first.table is not second.table or first.rows != second.rows:
            return None
        return (TableRows(name, first.table, first.rows, first.signs + second.signs),)
    if isinstance(first, Columns) and isinstance(second, Columns):
        half = second.stop
        swaps = (second.start, first.start, first.stop) == (0, half, 2 * half)
        if swaps and first.source is second.source:
            return (Swapped(name, first.source),)
    if isinstance(first, Rope) and isinstance(second, Columns):
        part = first.source
        if (
            isinstance(part, Columns)
            and part.source is second.source
            and (part.start, part.stop) == (0, second.start)
            and part.stop == 2 * first.cos.shape[1]
        ):
            return (Rope(name, part.source, first.cos, first.sin, first.rows),)
    return None


def rotated(name: str, pair: tuple[Value, Value]) -> Rope | None:
    """``x * [cos, cos] + [second, first] * [-sin, sin]``; None for another sum."""
    terms = [_by_rows(term) for term in pair]
    for straight, crossed in (terms, terms[::-1]):
        if straight is None or crossed is None or not isinstance(crossed[0], Swapped):
            continue
        (x, cos), (swapped, sin) = straight, crossed
        assert isinstance(swapped, Swapped)
        fits = (cos.signs, sin.signs) == ((1, 1), (-1, 1)) and cos.rows == sin.rows
        if fits and swapped.source is x:
            return Rope(name, x, cos.table, sin.table, cos.rows)
    return None


def _by_rows(term: Value) -> tuple[Value, TableRows] | None:
    if not isinstance(term, Product):
        return None
    for one, other in (term.factors, term.factors[::-1]):
        if isinstance(other, TableRows):
            return one, other
    return None


def slice_update(walk: Walk, name: str, given: Given) -> Made:
    """New rows that replace a slice of a cache."""
    old, new = given["x"][0], given["update"][0]
    begin, end = given["begin"][0], given["end"][0]
    free = [whole_numbers(given[key][0]) for key in ("begin_mask", "end_mask")]
    if not isinstance(old, Held) or free != [(1, 1, 0, 1), (1, 1, 0, 1)]:
        return None
    if not (isinstance(begin, Numbers) and isinstance(end, Numbers)):
        return None
    rows = tuple(
        tuple(range(int(first[2]), int(last[2])))
        for first, last in zip(begin.arrays, end.arrays, strict=True)
    )
    return (Updated(name, old, new, rows, _output(walk, name)),)


def one_hot_update(walk: Walk, name: str, pair: tuple[Value, Value]) -> Updated | None:
    """``old * kept + rows at the places where hot is 1``; None for another sum."""
    for stay, come in (pair, pair[::-1]):
        if not isinstance(stay, Product):
            continue
        old, kept = stay.factors
        placed = operands(come, "placed")
        if not isinstance(old, Held) or not isinstance(kept, Numbers) or placed is None:
            continue
        hot, new = placed
        assert isinstance(hot, Numbers)
        rows = []
        for where, left in zip(hot.arrays, kept.arrays, strict=True):
            length = left.size
            flat = where.reshape(-1, length)
            if not np.array_equal(left.ravel(), 1 - flat.sum(0)) or (flat.sum(1) != 1).any():
                return None
            rows.append(tuple(map(int, flat.argmax(1))))
        return Updated(name, old, new, tuple(rows), _output(walk, name))
    return None


def _output(walk: Walk, name: str) -> str:
    return name if name in walk.operations.outputs else ""


def placed_by(walk: Walk, name: str, pair: tuple[Value, Value]) -> Made:
    """One token's rows times a column of zeros and a one."""
    for new, hot in (pair, pair[::-1]):
        if isinstance(hot, Numbers) and not isinstance(new, Numbers | Constant | Held):
            return (Unknown(name, "placed", (hot, new)),)
    return None


def mixed(walk: Walk, name: str, given: Given) -> Made:
    """Matrix products of attention: scores, their mix of values, and rows put in their places.

    Given::

        scores = softmax((s - max(s)) * m), s = (rows / m * scale) @ keys.T + mask
        scores = softmax(s - max(s)), s = tanh((rows / m * scale) @ keys.T * m / cap) * cap + mask
        mixed = scores @ values
    """
    x, y = given["x"][0], given["y"][0]
    turned = [whole_numbers(given[key][0]) for key in ("transpose_x", "transpose_y")]
    if isinstance(x, Numbers):
        return (Unknown(name, "placed", (x, y)),) if turned == [(1,), (0,)] else None
    if not isinstance(y, Updated):
        return None
    if turned == [(0,), (1,)]:
        return (Unknown(name, "scores", (x, y)),)
    weights = operands(x, "softmax")
    if weights is None or turned != [(0,), (0,)]:
        return None
    found = _softmax_operand(weights[-1])
    if found is None:
        return None
    query, keys, mask, scale, softcap = found
    return _attention(walk, name, query, keys, y, mask, scale, softcap)


def _softmax_operand(value: Value) -> tuple[Value, Value, Value, float, float] | None:
    """Queries, keys, mask, scale and softcap of what a softmax is taken of."""
    stretched: Value | None = None
    if isinstance(value, Product):
        value, stretched = value.factors
    parts = operands(value, "sub")
    if parts is None or not isinstance(parts[0], Sum):
        return None
    seen, top = parts
    highest = operands(top, "reduce_max")
    assert isinstance(seen, Sum)
    scores, softcap = seen.terms[0], 0.0
    if stretched is None:
        capped = _capped(scores)
        if capped is None:
            return None
        scores, stretched, softcap = capped
    product = operands(scores, "scores")
    if highest is None or highest[-1] is not seen or product is None:
        return None
    scaled, keys = product
    if not isinstance(scaled, Scaled):
        return None
    divided = operands(scaled.source, "real_div")
    if divided is None or divided[1] is not stretched:
        return None
    return divided[0], keys, seen.terms[1], scaled.factor, softcap


def _capped(value: Value) -> tuple[Value, Value, float] | None:
    """``cap * tanh(scores * (divisor / cap))``: the scores, their divisor, and the cap."""
    bent = function_operand(value.source, "tanh") if isinstance(value, Scaled) else None
    if not isinstance(bent, Product):
        return None
    assert isinstance(value, Scaled)
    scores, factor = bent.factors
    divided = operands(factor, "real_div")
    if divided is None or number(divided[1]) != value.factor:
        return None
    return scores, divided[0], value.factor


def fused(walk: Walk, name: str, given: Given) -> Made:
    """Attention as one operation, whose scale is that of the stated width of keys."""
    query, keys, values, mask = (given[key][0] for key in ("query", "key", "value", "attn_mask"))
    width = walk.shape(keys.old)[-1] if isinstance(keys, Updated) else 1
    if width is None:
        return None
    return _attention(walk, name, query, keys, values, mask, width**-0.5, 0.0)


def _attention(
    walk: Walk,
    name: str,
    query: Value,
    keys: Value,
    values: Value,
    mask: Value,
    scale: float,
    softcap: float,
) -> Made:
    if not (isinstance(keys, Updated) and isinstance(values, Updated)):
        return (Unknown(name, NO_NEW_ROWS, (query, keys, values)),)
    if not isinstance(mask, Numbers):
        return None
    heads, visible = _heads(walk, query, keys), _visible(walk, mask)
    if heads is None or visible is None:
        return None
    return (
        Attention(
            name,
            query,
            keys.new,
            values.new,
            heads,
            scale,
            _cache(walk, keys),
            _cache(walk, values),
            visible,
            softcap,
        ),
    )


def _heads(walk: Walk, query: Value, keys: Updated) -> tuple[int, int, int] | None:
    """The numbers of query heads and of key heads, and their width.

    Views are not lifted, so that queries and keys may have their heads apart or side by side; the
    cache has those of the keys apart.
    """
    of_cache = walk.shape(keys.old)
    columns = [math.prod(size or 0 for size in walk.shape(each)[2:]) for each in (query, keys.new)]
    kv_heads = of_cache[1] if len(of_cache) == 4 else None
    if not kv_heads or not all(columns) or columns[1] % kv_heads:
        return None
    heads, rest = divmod(columns[0], columns[1] // kv_heads)
    return None if rest else (heads, kv_heads, columns[1] // kv_heads)


def _cache(walk: Walk, updated: Updated) -> Cache:
    shape = walk.shape(updated.old)
    length = shape[2] if len(shape) == 4 else None
    written = cache_label(updated.written) if updated.written else "nowhere"
    return Cache(cache_label(updated.old.cache), written, length, updated.rows)


def _visible(walk: Walk, mask: Numbers) -> tuple[Array, ...] | None:
    """Which tokens a mask shows, the same for all query heads of a key head; else None."""
    if mask.name not in walk.visible:
        walk.visible[mask.name] = _shown(walk, mask)
    return walk.visible[mask.name]


def _shown(walk: Walk, mask: Numbers) -> tuple[Array, ...] | None:
    found = []
    for probe, array in zip(walk.probes, mask.arrays, strict=True):
        seen = np.asarray(array).reshape(-1, array.shape[-1]) >= 0
        groups, rest = divmod(len(seen), probe.count)
        if rest or not groups or math.prod(array.shape[:-2]) != 1:
            return None
        apart = seen.reshape(groups, probe.count, -1)
        if (apart != apart[0]).any() or (array[~seen.reshape(array.shape)] > -1e4).any():
            return None
        found.append(apart[0])
    return tuple(found)
