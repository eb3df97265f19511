"""Recognises what gives tokens their weights of experts, by what it makes of a few rows of logits.

Which operations compute the weights does not matter. They are run with NumPy on rows with and
without equal logits, and what comes out is compared with what `quant.program.expert_ops` defines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from exporters.lifted import Array, Constant, Sum, Unknown, Value
from exporters.lifted_mixture import Route, RouteSparseMixer

_FEW: Final = 24  # rows of every kind
_SLACK: Final = 1e-9  # all is computed in float64


def route_of(value: Value, experts: int) -> Route | RouteSparseMixer | None:
    """The choice of experts whose weights a value is; None for anything else.

    Args:
        value: ``float[1, t, experts]``.
        experts: the number of experts.
    """
    source = logits_of(value)
    if source is None or source is value:
        return None
    logits = _samples(experts)
    try:
        with np.errstate(all="ignore"):
            found = np.asarray(_run(value, {id(source): logits}), np.float64)
            return _named(value, source, logits, found) if found.shape == logits.shape else None
    except (KeyError, ValueError, IndexError):  # an operation with operands that no route has
        return None


def _named(
    value: Value, source: Value, logits: Array, found: Array
) -> Route | RouteSparseMixer | None:
    """The choice that gives these weights for these logits."""
    tree = list(_tree(value))
    chosen = int(np.count_nonzero(found[0, 0]))
    divided = any(isinstance(each, Unknown) and each.kind == "real_div" for each in tree)
    for normalized in (divided, not divided):
        if np.allclose(found, _route(logits, chosen, normalized), 0, _SLACK):
            return Route(value.name, source, chosen, normalized)
    for each in tree:
        if isinstance(each, Constant) and each.array.size == 1:
            jitter = float(each.array.ravel()[0]) / 2
            if np.allclose(found, _sparse_mixer(logits, jitter), 0, _SLACK):
                return RouteSparseMixer(value.name, source, jitter)
    return None


def logits_of(value: Value) -> Value | None:
    """The one value that is no constant and that a tree of a route's operations begins with."""
    found = {
        id(each): each
        for each in _tree(value)
        if not isinstance(each, Constant) and not _operands(each)
    }
    return next(iter(found.values())) if len(found) == 1 else None


def _operands(value: Value) -> tuple[Value, ...]:
    if isinstance(value, Sum):
        return value.terms
    return value.operands if isinstance(value, Unknown) and value.kind in _RUN else ()


def _tree(value: Value) -> Iterator[Value]:
    """A value and all that it is made of, each once."""
    seen, left = set(), [value]
    while left:
        each = left.pop()
        if id(each) not in seen:
            seen.add(id(each))
            left += _operands(each)
            yield each


def _samples(experts: int) -> Array:
    """Array of logits: any, near each other, with equal ones, all equal: ``[1, rows, experts]``."""
    draw = np.random.default_rng(0)
    rows = draw.normal(0, 2, (_FEW, experts))
    near = 1 + draw.uniform(0, 0.05, (_FEW, experts))
    return np.concatenate((rows, near, -near, np.round(rows), np.ones((1, experts))))[None]


def _run(value: Value, known: dict[int, Array]) -> Array:
    if id(value) not in known:
        if isinstance(value, Constant):
            known[id(value)] = value.array
        else:
            operands = [_run(each, known) for each in _operands(value)]
            kind = value.kind if isinstance(value, Unknown) else "add"
            known[id(value)] = np.asarray(_RUN[kind](*operands))
    return known[id(value)]


def _softmax(axis: Array, x: Array) -> Array:
    _last(axis)
    powers = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _topk(
    ascending: Array, axis: Array, k: Array, return_indices: Array, sort: Array, x: Array
) -> Array:
    _last(axis)
    if ascending.any() or return_indices.any():
        raise ValueError("another form of topk")
    return np.sort(x, -1)[..., ::-1][..., : int(k.ravel()[0])]


def _cumsum(axis: Array, exclusive: Array, reverse: Array, x: Array) -> Array:
    _last(axis)
    if exclusive.any() or reverse.any():
        raise ValueError("another form of cumsum")
    return np.cumsum(x, -1)


def _reduction(run: Callable[..., Array]) -> Callable[[Array, Array, Array], Array]:
    def reduce(axes: Array, keep_dims: Array, x: Array) -> Array:
        _last(axes)
        return run(x, axis=-1, keepdims=bool(keep_dims))

    return reduce


def _select(a: Array, b: Array, cond: Array) -> Array:
    return np.asarray(np.where(cond, a, b))


def _last(axis: Array) -> None:
    if tuple(axis.ravel()) != (-1,):
        raise ValueError("another axis than the last")


# By operation, of its operands in the order of their parameters' names.
_RUN: Final[Mapping[str, Callable[..., Array]]] = {
    "softmax": _softmax,
    "topk": _topk,
    "cumsum": _cumsum,
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_sum": _reduction(np.sum),
    "select": _select,
    "add": np.add,
    "sub": np.subtract,
    "real_div": np.divide,
    "maximum": np.maximum,
    "abs": np.abs,
    "less": np.less,
    "greater": np.greater,
    "equal": np.equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_not": np.logical_not,
}


def _route(logits: Array, chosen: int, normalized: bool) -> Array:
    """``edgeforge::route``."""
    shares = _softmax(np.array(-1), logits)
    order = np.argsort(-shares, -1, kind="stable")[..., :chosen]
    made = np.zeros_like(shares)
    np.put_along_axis(made, order, np.take_along_axis(shares, order, -1), -1)
    return np.asarray(made / made.sum(-1, keepdims=True)) if normalized else made


def _sparse_mixer(logits: Array, jitter: float) -> Array:
    """``edgeforge::route_sparse_mixer``."""
    scores = np.asarray(logits, np.float64)
    made, left = np.zeros_like(scores), scores
    for _ in range(2):
        most = left.max(-1, keepdims=True)
        best = np.argmax(left, -1)[..., None]
        far = (most - scores) / np.maximum(np.abs(scores), most) > 2 * jitter
        shares = _softmax(np.array(-1), np.where(far, -np.inf, left))
        np.put_along_axis(made, best, np.take_along_axis(shares, best, -1), -1)
        left = left.copy()
        np.put_along_axis(left, best, -np.inf, -1)
    return made
