"""Lifts the rows that experts compute, and their sum; see `exporters.onnx.experts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from exporters.lifted import Constant, Unknown, Value
from exporters.lifted_mixture import ChosenTokens, Combine
from exporters.onnx.lifted_routing import Experts, Shares, are_in_order
from exporters.onnx.lifted_values import Graph, Lifted, Part

if TYPE_CHECKING:
    from onnx import NodeProto

# Kinds of values that are computed from the chosen experts alone: their ids in a row, the places
# of the ids in ascending order, the token of each place, which expert each id is (as booleans and
# as integers), how many rows each expert has, and where each token's own rows are.
_IDS, _ORDER, _TOKENS, _IS, _ONES, _COUNTS, _PLACES = (
    f"{part} of chosen experts"
    for part in ("ids", "order", "tokens", "matches", "ones", "counts", "places")
)
# Kinds of values on the way to the sum: the experts' results one below another, the same sorted
# by token, those of each token together, its weights of them, and the products of both.
_RESULTS, _SORTED, _OWN, _FACTORS, _WEIGHTED = (
    f"{part} of experts"
    for part in ("results", "sorted results", "own results", "factors", "weighted results")
)


@dataclass(frozen=True, eq=False)
class _Rows(Value):
    """Rows for all experts, sorted by expert: of each token as often as it chose one."""

    source: Value
    experts: Experts


def reshape(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the ids of the chosen experts in a row, and each token's own results."""
    source, shape = given
    name = node.output[0]
    if isinstance(source, Experts):
        flat = isinstance(shape, Constant) and shape.array.tolist() == [-1]
        return (Unknown(name, _IDS if flat else "Reshape", (source,)),)
    if _is(source, _SORTED):
        match shape:
            case Unknown(
                kind="Concat",
                operands=(Unknown(kind="Shape", operands=(Shares() as shares,)), Constant()),
            ):
                return (Unknown(name, _OWN, (source, shares)),)
        return (Unknown(name, "Reshape", given),)
    return None


def order(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the places of numbers in ascending order."""
    source, count = given
    ascending = not attributes.get("largest", 1) and attributes.get("sorted", 1)
    if attributes.get("axis", -1) != 0 or not ascending or not isinstance(source, Unknown):
        return None
    if not (isinstance(count, Unknown) and count.kind == "Shape" and count.operands == (source,)):
        return None
    made = {_IDS: _ORDER, _ORDER: _PLACES}.get(source.kind)
    if made is None:
        return None
    values, indices = node.output
    return (Unknown(values, "TopK", given), Unknown(indices, made, source.operands))


def divide(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the token to which each place belongs."""
    places, by = given
    if not (_is(places, _ORDER) and isinstance(by, Constant) and by.array.dtype.kind == "i"):
        return None
    experts = _experts(places)
    if by.array.ravel().tolist() != [experts.chosen]:
        return None
    return (Unknown(node.output[0], _TOKENS, (experts,)),)


def gather(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the rows of all experts, and their results in the order of the tokens."""
    source, places = given
    if attributes.get("axis", 0):
        return None
    if _is(places, _TOKENS):
        return (_Rows(node.output[0], source, _experts(places)),)
    if _is(places, _PLACES) and _is(source, _RESULTS):
        assert isinstance(source, Unknown)
        return (Unknown(node.output[0], _SORTED, (_experts(places), *source.operands)),)
    return None


def equal(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts which of all experts each id is."""
    ids, numbers = given
    if not (_is(ids, _IDS) and isinstance(numbers, Constant) and are_in_order(numbers)):
        return None
    if numbers.array.shape != (numbers.array.size, 1):
        return None
    return (Unknown(node.output[0], _IS, (_experts(ids), numbers)),)


def cast(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the same as integers."""
    if not _is(given[0], _IS) or attributes["to"] != 7:
        return None
    assert isinstance(given[0], Unknown)
    return (Unknown(node.output[0], _ONES, given[0].operands),)


def reduce_sum(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts how many rows each expert has, and the sum of each token's results."""
    source, axes = given
    if attributes.get("keepdims", 1) or not isinstance(axes, Constant):
        return None
    along = axes.array.tolist()
    if _is(source, _ONES) and along == [1]:
        assert isinstance(source, Unknown)
        return (Unknown(node.output[0], _COUNTS, source.operands),)
    match source:
        case Unknown(kind=kind, operands=(Experts() as experts, Shares() as shares, *results)):
            same = kind == _WEIGHTED and along == [-2] and experts.route is shares.route
            terms = _terms(experts, tuple(results)) if same else None
            return None if terms is None else (Combine(node.output[0], experts.route, terms),)
    return None


def split(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts each expert's rows."""
    rows, counts = given
    if not (isinstance(rows, _Rows) and _is(counts, _COUNTS)) or attributes.get("axis", 0):
        return None
    assert isinstance(counts, Unknown)
    experts, numbers = counts.operands
    assert isinstance(numbers, Constant)
    if experts is not rows.experts or numbers.array.size != len(node.output):
        return None
    return tuple(
        ChosenTokens(name, rows.source, rows.experts.route, expert)
        for expert, name in enumerate(node.output)
    )


def concat(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the experts' results one below another."""
    if attributes.get("axis") or _chosen(given[0]) is None:
        return None
    return (Unknown(node.output[0], _RESULTS, given),)


def unsqueeze(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a token's weights as factors of its results."""
    shares, axes = given
    if not (isinstance(shares, Shares) and isinstance(axes, Constant)):
        return None
    if axes.array.tolist() != [-1]:
        return None
    return (Unknown(node.output[0], _FACTORS, (shares,)),)


def mul(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a token's results times its weights."""
    match given:
        case (
            Unknown(kind=own, operands=(Unknown(operands=operands), Shares() as shaped)),
            Unknown(kind=factors, operands=(Shares() as shares,)),
        ) if own == _OWN and factors == _FACTORS and shaped is shares:
            experts, *results = operands
            return (Unknown(node.output[0], _WEIGHTED, (experts, shares, *results)),)
    return None


def _terms(experts: Experts, results: tuple[Value, ...]) -> tuple[tuple[int, Value], ...] | None:
    """The experts' results by their numbers; None where one is not of its own rows."""
    for expert, result in enumerate(results):
        chosen = _chosen(result)
        if chosen is None or chosen.expert != expert or chosen.weights is not experts.route:
            return None
    return tuple(enumerate(results))


def _chosen(value: Value) -> ChosenTokens | None:
    """The only rows that a value of a branch is computed from; None where there are others."""
    found: dict[Value | None, None] = {}
    waiting, seen = [value], {value}
    while waiting and len(found) < 2:
        one = waiting.pop()
        if isinstance(one, ChosenTokens):
            found[one] = None
            continue
        inner = [getattr(one, each.name) for each in fields(one)]
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        operands = [part for part in parts if isinstance(part, Value)]
        if not operands and not isinstance(one, Constant | Part):
            found[None] = None
        waiting += [each for each in operands if each not in seen]
        seen.update(operands)
    (only, *others) = found or (None,)
    return only if not others and isinstance(only, ChosenTokens) else None


def _is(value: Value, kind: str) -> bool:
    return isinstance(value, Unknown) and value.kind == kind


def _experts(value: Value) -> Experts:
    assert isinstance(value, Unknown)
    experts = value.operands[0]
    assert isinstance(experts, Experts)
    return experts
