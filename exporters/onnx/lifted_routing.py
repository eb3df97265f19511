"""Lifts what a router chooses; see `exporters.onnx.routing`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporters.lifted import Constant, Last, Unknown, Value
from exporters.lifted_mixture import Route, RouteSparseMixer
from exporters.onnx import lifted_attention
from exporters.onnx.lifted_values import Graph, Lifted

if TYPE_CHECKING:
    from onnx import NodeProto

# Kinds of values on the way to a choice: a softmax over all experts, the largest of one value and
# its index, whether an expert is that index, a share that is taken by an index, and a sum.
SOFTMAX, _LARGEST, _INDEX, _TAKEN, _SHARE, _SUM = (
    f"{part} of a router" for part in ("softmax", "largest", "index", "taken", "share", "sum")
)


@dataclass(frozen=True, eq=False)
class Experts(Value):
    """The experts that each token chose, ``int64[1, t, chosen]``.

    Attributes:
        route: what chose them, or the last tokens' rows of it.
        chosen: how many a token has.
    """

    route: Route | RouteSparseMixer | Last
    chosen: int


@dataclass(frozen=True, eq=False)
class Shares(Value):
    """Each token's weights of the experts that it chose, ``float[1, t, chosen]``.

    Attributes:
        route: what chose them, or the last tokens' rows of it.
        experts: the name of the experts; empty where two values hold them, or of the last tokens.
        indices: of SparseMixer, the two values.
    """

    route: Route | RouteSparseMixer | Last
    experts: str
    indices: tuple[Value, ...] = ()


def softmax(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a softmax over the last dimension."""
    return (Unknown(node.output[0], SOFTMAX, given),) if attributes.get("axis") == -1 else None


def top_k(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the choice of the largest shares, or of one largest logit."""
    source, count = given
    largest = attributes.get("largest", 1) == 1 and attributes.get("sorted", 1) == 1
    if not (isinstance(count, Constant) and count.array.size == 1 and largest):
        return None
    if attributes.get("axis", -1) != -1:
        return None
    values, indices = node.output
    number = int(count.array.ravel()[0])
    if isinstance(source, Unknown) and source.kind == SOFTMAX:
        route = Route(values, source.operands[0], number, False, (indices,))
        return (Shares(values, route, indices), Experts(indices, route, number))
    if number == 1:
        return (Unknown(values, _LARGEST, (source,)), Unknown(indices, _INDEX, (source,)))
    return None


def total(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the sum of each token's shares."""
    shares, axes = given
    last = isinstance(axes, Constant) and axes.array.tolist() == [-1]
    if isinstance(shares, Shares) and last and attributes.get("keepdims", 1):
        return (Unknown(node.output[0], _SUM, (shares,)),)
    return None


def divide(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts shares that are divided by their sum; the chosen experts get the same route."""
    shares, by = given
    if not (isinstance(shares, Shares) and isinstance(shares.route, Route)):
        return None
    if not (isinstance(by, Unknown) and by.kind == _SUM and by.operands == (shares,)):
        return None
    name, chosen = node.output[0], shares.route.chosen
    route = Route(name, shares.route.source, chosen, True, (shares.experts,))
    graph.values[shares.experts] = Experts(shares.experts, route, chosen)
    return (Shares(name, route, shares.experts),)


def equal(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts whether an expert is the one of the largest logit."""
    numbers, index = given
    if isinstance(index, Unknown) and index.kind == _INDEX and are_in_order(numbers):
        return (Unknown(node.output[0], _TAKEN, (index,)),)
    return None


def are_in_order(value: Value) -> bool:
    """Whether a value is the numbers of all experts, from 0."""
    if not isinstance(value, Constant):
        return False
    return value.array.ravel().tolist() == list(range(value.array.size))


def gather_share(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the share of a chosen expert."""
    return (Unknown(node.output[0], _SHARE, given),) if attributes.get("axis") == -1 else None


def sparse_mixer(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts SparseMixer's two shares, and then its two indices."""
    if len(given) != 2 or attributes.get("axis") != -1:
        return None
    name = node.output[0]
    for known in graph.values.values():
        if isinstance(known, Shares) and known.indices == given:
            return (Experts(name, known.route, 2),)
    first, second = (_candidate(value) for value in given)
    if first is None or second is None:
        return None
    scores = first.scores
    match second.left:
        case Unknown(kind="Where", operands=(Unknown(kind=kind, operands=(taken,)), none, rest)):
            left = kind == _TAKEN and taken is first.index and _is_minus_infinity(none)
            again = left and rest is scores and second.scores is scores
        case _:
            again = False
    if not again or first.left is not scores or first.limit != second.limit:
        return None
    names = first.index.name, second.index.name
    route = RouteSparseMixer(name, scores, first.limit / 2, names)
    return (Shares(name, route, "", (first.index, second.index)),)


def last(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the last tokens' choice: of their experts and of their weights it is the same one."""
    source = given[0]
    rows = lifted_attention.last(graph, node, given, attributes)
    if not isinstance(source, Experts | Shares) or rows is None or not isinstance(rows[0], Last):
        return rows
    positions, route = rows[0].positions, Last(rows[0].name, source.route, rows[0].positions)
    for known in graph.values.values():
        match known:
            case Experts(route=Last() as same) | Shares(route=Last() as same):
                if same.source is source.route and same.positions == positions:
                    route = same
    if isinstance(source, Experts):
        return (Experts(node.output[0], route, source.chosen),)
    return (Shares(node.output[0], route, ""),)


@dataclass(frozen=True)
class _Candidate:
    """One of SparseMixer's two choices.

    Attributes:
        scores: all logits.
        left: those that may be chosen.
        index: the expert of the largest of them.
        limit: the largest relative distance of a candidate.
    """

    scores: Value
    left: Value
    index: Value
    limit: float


def _candidate(share: Value) -> _Candidate | None:
    """Takes one of SparseMixer's shares apart; None where it is none."""
    match share:
        case Unknown(
            kind=kind,
            operands=(
                Unknown(
                    kind=softmax,
                    operands=(
                        Unknown(
                            kind="Where",
                            operands=(Unknown(kind="Greater", operands=(far, limit)), none, left),
                        ),
                    ),
                ),
                index,
            ),
        ) if kind == _SHARE and softmax == SOFTMAX and _is_minus_infinity(none):
            scores = _scores(far, left)
        case _:
            return None
    own = isinstance(index, Unknown) and index.kind == _INDEX and index.operands[0] is left
    if scores is None or not own or not isinstance(limit, Constant):
        return None
    return _Candidate(scores, left, index, float(limit.array))


def _scores(far: Value, left: Value) -> Value | None:
    """The logits whose relative distance from the largest left one is computed."""
    match far:
        case Unknown(
            kind="Div",
            operands=(
                Unknown(kind="Sub", operands=(largest, scores)),
                Unknown(
                    kind="Max", operands=(Unknown(kind="Abs", operands=(magnitude,)), largest_again)
                ),
            ),
        ) if magnitude is scores and largest is largest_again:
            of = largest.operands if isinstance(largest, Unknown) else ()
            same = isinstance(largest, Unknown) and largest.kind == _LARGEST and of == (left,)
            return scores if same else None
    return None


def _is_minus_infinity(value: Value) -> bool:
    return isinstance(value, Constant) and bool(np.isneginf(value.array).all())


EMITTED: Final = frozenset(
    {"Softmax", "TopK", "Equal", "GatherElements", "Greater", "Abs", "Sigmoid"}
)
"""The operators of routers and their experts that nothing else is lowered to."""
