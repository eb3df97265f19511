"""Lifts recurrences and their memories; see `exporters.onnx.recurrence`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.lifted import (
    Array,
    Constant,
    Numbers,
    Product,
    Recent,
    StoredFormat,
    StoredWeight,
    Unknown,
    Value,
)
from exporters.lifted_recurrent import (
    Gain,
    Recurrence,
)
from exporters.onnx.lifted_values import Graph, Lifted, Part

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

# Kinds of values: a token of zeros in front of others, and one behind them.
_LATE, _LONGER = "tokens one late", "tokens and one more"


@dataclass(frozen=True, eq=False)
class _Found(Value):
    """What a kernel finds when it gets keys, values and decays one token late.

    Attributes:
        made: the recurrence, without the token's own key.
        whole: whether the result of the token that the queries do not have is still there.
    """

    made: Recurrence
    whole: bool


@dataclass(frozen=True)
class _Call:
    """A kernel's call in one branch, its operands without what only padding needs."""

    operands: tuple[Value, ...]
    attributes: Mapping[str, Any]
    memory: str
    ignored: tuple[bool, ...]


def concat(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts tokens with one of zeros before or behind them."""
    if len(given) != 2 or attributes.get("axis") != 1:
        return None
    first, second = map(_is_zero_token, given)
    if first == second:
        return None
    source = given[1] if first else given[0]
    return (Unknown(node.output[0], _LATE if first else _LONGER, (source,)),)


def _is_zero_token(value: Value) -> bool:
    match value:
        case Unknown(kind="Expand", operands=(Constant() as zero, Numbers() as shape)):
            sizes = [array.tolist() for array in shape.arrays]
            return not zero.array.any() and all(each[:2] == [1, 1] for each in sizes)
    return False


def branches(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a recurrence, whose two branches differ for rows that begin alone."""
    begins = given[0]
    if not isinstance(begins, Numbers) or len(node.output) != 2:
        return None
    taken = tuple(bool(array.ravel()[0]) for array in begins.arrays)
    calls = [_branch(graph, attributes[f"{which}_branch"]) for which in ("then", "else")]
    first, other = calls
    if first is None or other is None or first.memory != other.memory:
        return None
    same = len(first.operands) == len(other.operands) and all(
        one is another for one, another in zip(first.operands, other.operands, strict=True)
    )
    if not same or first.attributes != other.attributes:
        return None
    ignored = tuple(
        (first if begins_now else other).ignored[probe] for probe, begins_now in enumerate(taken)
    )
    return _lifted(graph, node, first, ignored)


def _lifted(graph: Graph, node: NodeProto, call: _Call, ignored: tuple[bool, ...]) -> Lifted:
    query, key, value, decay, *beta = call.operands
    name, to = node.output
    is_late = [isinstance(each, Unknown) and each.kind == _LATE for each in (key, value, decay)]
    late = all(is_late) and isinstance(query, Unknown) and query.kind == _LONGER
    if late:
        query, key, value, decay = (
            each.operands[0] for each in (query, key, value, decay) if isinstance(each, Unknown)
        )
    elif any(is_late):
        return None
    shape = graph.input_shape(call.memory)
    heads, rows, columns = shape[1:]
    if call.attributes.get("kv_num_heads") != heads or call.attributes.get("scale") != 1.0:
        return None
    if call.attributes.get("update_rule") != (b"gated_delta" if beta else b"gated"):
        return None
    decays = None
    if isinstance(decay, Part):
        if decay.tensor.name.removesuffix(".stored") != decay.weight:
            return None
        own, decays = _weight(graph, decay)
        if decays.shape != (heads, rows):
            return None
    written = _named(to) if to in graph.outputs else f"{to}, no output"
    made = Recurrence(
        name,
        query,
        key,
        value,
        decay if decays is None else own,
        decays,
        None,
        None,
        beta[0] if beta else None,
        (heads, call.attributes["q_num_heads"], rows, columns),
        Recent(_named(call.memory), written, ignored),
    )
    return (_Found(name, made, True) if late else made, Unknown(to, "memory"))


def _branch(graph: Graph, branch: GraphProto) -> _Call | None:
    """The call of the kernel; None where the branch has what the lowering does not emit."""
    from onnx import helper

    inner: dict[str, Value] = {}
    kernel = branch.node[-1]
    for node in branch.node[:-1]:
        given = [_value(graph, inner, name) for name in node.input]
        if node.op_type != "Where" or len(given) != 3:
            return None
        inner[node.output[0]] = Unknown(node.output[0], "Where", tuple(given))
    if kernel.op_type != "LinearAttention" or len(kernel.input) not in (5, 6):
        return None
    if [value.name for value in branch.output] != list(kernel.output):
        return None
    query, key, value, past, decay, *beta = (_value(graph, inner, n) for n in kernel.input)
    memory = _memory(past, len(graph.probes))
    clean = [query, *(_attended(each) for each in (key, value, decay)), *beta]
    if memory is None or None in clean:
        return None
    attributes = {each.name: helper.get_attribute_value(each) for each in kernel.attribute}
    return _Call(tuple(each for each in clean if each is not None), attributes, *memory)


def _value(graph: Graph, inner: Mapping[str, Value], name: str) -> Value:
    return inner.get(name) or graph.values.get(name) or Unknown(name, "input")


def _memory(past: Value, probes: int) -> tuple[str, tuple[bool, ...]] | None:
    """The state that a call reads, and whether it takes zeros instead, for each probe."""
    match past:
        case Unknown(kind="input"):
            return past.name, (False,) * probes
        case Unknown(
            kind="Where",
            operands=(Numbers() as begins, Constant() as zero, Unknown(kind="input") as state),
        ) if not zero.array.any():
            return state.name, tuple(bool(array.all()) for array in begins.arrays)
    return None


def _attended(value: Value) -> Value | None:
    """What stands at all tokens of a text without padding; None where tokens are left out."""
    match value:
        case Unknown(
            kind="Where", operands=(Numbers() as attended, source, Constant() as zero)
        ) if not zero.array.any():
            return source if all(array.all() for array in attended.arrays) else None
    return value


def slice_of(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts what a kernel found before the memory was updated."""
    source, *numbers = given
    bounds = [each.array.tolist() for each in numbers if isinstance(each, Constant)]
    if not (isinstance(source, _Found) and source.whole and bounds == [[0], [-1], [1]]):
        return None
    return (_Found(node.output[0], source.made, False),)


def add(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the sum of what was found before the update and what the token's own key adds."""
    match given:
        case (
            _Found(made=made, whole=False),
            Product(
                factors=(
                    Unknown(
                        kind="ReduceSum",
                        operands=(Product(factors=(Gain() as preferred, key)), Constant() as axis),
                    ),
                    value,
                )
            ),
        ) if axis.array.tolist() == [-1]:
            if preferred.source is not made.query or key is not made.key or value is not made.value:
                return None
            if preferred.values.shape != made.dimensions[:1] + made.dimensions[2:3]:
                return None
            return (
                Recurrence(
                    node.output[0],
                    made.query,
                    made.key,
                    made.value,
                    made.decay,
                    made.decays,
                    preferred.weight,
                    preferred.values,
                    made.beta,
                    made.dimensions,
                    made.memory,
                ),
            )
    return None


def gain(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a product with a weight's factors."""
    source, part = given
    if not isinstance(part, Part) or isinstance(source, Part | Constant | Numbers):
        return None
    if not part.dtype or part.tensor.name.removesuffix(".stored") != part.weight:
        return None
    return (Gain(node.output[0], source, *_weight(graph, part)),)


def _weight(graph: Graph, part: Part) -> tuple[StoredWeight, Array]:
    values = graph.array(part.tensor).astype(np.float32)
    return StoredWeight(part.weight, StoredFormat(part.dtype)), values


def _named(name: str) -> str:
    """A memory's name without the side on which it enters or leaves: ``3.memory``."""
    inner = name.removeprefix("past_key_values.").removeprefix("present.")
    return f"{inner.removesuffix('.recurrent_state')}.memory"
