"""Lifts the rows that experts compute, and what gathers them; see `exporters.onnx.experts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from exporters.lifted import Constant, Last, Unknown, Value
from exporters.lifted_mixture import ChosenSlots, ChosenTokens, Combine, Slots
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
# Kinds of values around attention whose heads are experts': the own results of each token with
# their heads apart, and the heads in front of the slots; of what attention gives the heads and
# slots apart, the slots in front of the heads, and the slots one below another.
_HEADS, _BY_HEAD, _APART, _BY_SLOT, _SLOTS = (
    f"{part} of slots"
    for part in ("heads", "results by head", "heads and slots", "heads by slot", "rows")
)
_APART_TURNED, _HEADS_TURNED = [0, 2, 1, 3], [0, 1, 3, 2, 4]


@dataclass(frozen=True, eq=False)
class _Rows(Value):
    """Rows for all experts, sorted by expert: of each token as often as it chose one.

    Attributes:
        source: the rows of all tokens, or their slots.
        experts: the experts that the tokens chose.
        heads: how many heads a slot has; 0 where rows are the tokens' own.
    """

    source: Value
    experts: Experts
    heads: int = 0


def reshape(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the ids of the chosen experts in a row, each token's own results, and slots."""
    source, shape = given
    name = node.output[0]
    to = shape.array.tolist() if isinstance(shape, Constant) else []
    if isinstance(source, Experts):
        return (Unknown(name, _IDS if to == [-1] else "Reshape", (source,)),)
    if isinstance(source, Unknown) and source.kind in (_SORTED, _BY_HEAD, _BY_SLOT):
        made = {_SORTED: _own, _BY_HEAD: _side_by_side, _BY_SLOT: _slot_rows}[source.kind]
        return (made(name, source, shape) or Unknown(name, "Reshape", given),)
    if len(to) == 4 and to[0] == -1:
        return (Unknown(name, _APART, given),)
    return None


def _own(name: str, source: Unknown, shape: Value) -> Value | None:
    """Each token's own results; with their heads apart, where the shape has these."""
    match shape:
        case Unknown(
            kind="Concat",
            operands=(Unknown(kind="Shape", operands=(Shares() as shares,)), Constant() as widths),
        ):
            if widths.array.shape == (1,):
                return Unknown(name, _OWN, (source, shares))
            if widths.array.shape == (2,):
                return Unknown(name, _HEADS, (source, shares, widths))
    return None


def _side_by_side(name: str, source: Unknown, shape: Value) -> Value | None:
    """What each token's experts computed, side by side."""
    rows, shares, widths = source.operands
    experts = _experts(rows)
    assert isinstance(rows, Unknown) and isinstance(shares, Shares)
    assert isinstance(widths, Constant)
    together = isinstance(shape, Constant) and shape.array.tolist() == [0, 0, -1]
    terms = _terms(experts, rows.operands[1:])
    if not together or terms is None or experts.route is not shares.route:
        return None
    return Slots(name, experts.route, terms, experts.chosen, int(widths.array[0]))


def _slot_rows(name: str, source: Unknown, shape: Value) -> Value | None:
    """Slots one below another."""
    apart = source.operands[1]
    assert isinstance(apart, Constant)
    _, heads, _, width = apart.array.tolist()
    flat = isinstance(shape, Constant) and shape.array.tolist() == [-1, heads * width]
    return Unknown(name, _SLOTS, source.operands) if flat and min(heads, width) > 0 else None


def transpose(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the change between a token's slots before heads and heads before slots."""
    source, order = given[0], list(attributes.get("perm", []))
    for kind, turned, made in (
        (_HEADS, _HEADS_TURNED, _BY_HEAD),
        (_APART, _APART_TURNED, _BY_SLOT),
    ):
        if _is(source, kind) and order == turned:
            assert isinstance(source, Unknown)
            return (Unknown(node.output[0], made, source.operands),)
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
    if _is(places, _ORDER) and _is(source, _SLOTS):
        return _rows_of_slots(node.output[0], source, _experts(places))
    if _is(places, _PLACES) and _is(source, _RESULTS):
        assert isinstance(source, Unknown)
        return (Unknown(node.output[0], _SORTED, (_experts(places), *source.operands)),)
    return None


def _rows_of_slots(name: str, source: Value, experts: Experts) -> Lifted:
    """Slots sorted by the experts that have them; None where they are not of the same tokens."""
    assert isinstance(source, Unknown)
    every, apart = source.operands
    assert isinstance(apart, Constant)
    _, heads, chosen, _ = apart.array.tolist()
    same = _last_positions(every) == _last_positions(experts.route) and chosen == experts.chosen
    return (_Rows(name, every, experts, heads),) if same else None


def _last_positions(value: Value) -> int:
    """How many last tokens a value is of; 0 for all of them."""
    return value.positions if isinstance(value, Last) else 0


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
    route, chosen = rows.experts.route, rows.experts.chosen
    return tuple(
        ChosenSlots(name, rows.source, route, expert, chosen, rows.heads)
        if rows.heads
        else ChosenTokens(name, rows.source, route, expert)
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


def _chosen(value: Value) -> ChosenTokens | ChosenSlots | None:
    """The only rows that a value of a branch is computed from; None where there are others."""
    found: dict[Value | None, None] = {}
    waiting, seen = [value], {value}
    while waiting and len(found) < 2:
        one = waiting.pop()
        if isinstance(one, ChosenTokens | ChosenSlots):
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
    return only if not others and isinstance(only, ChosenTokens | ChosenSlots) else None


def _is(value: Value, kind: str) -> bool:
    return isinstance(value, Unknown) and value.kind == kind


def _experts(value: Value) -> Experts:
    assert isinstance(value, Unknown)
    experts = value.operands[0]
    assert isinstance(experts, Experts)
    return experts
