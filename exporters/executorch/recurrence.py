"""Emits recurrences: a loop over tokens, whose body is a small delegate, around the memory.

The method jumps back to the first of these calls until each token had its turn::

    q, k, v, ... = select_copy(queries, 0, token), ...
    memory, row = delegate(q, k, v, ..., memory)
    rows[token] = row

A token's delegate is the same in every run, so that a text gives the same numbers in one run or in
several, as far as those before it do. At position 0 the memory is filled with zeros, whatever it
holds; other runs jump past this.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from exporters.executorch.norms import total
from exporters.executorch.state import MethodLowering
from exporters.executorch.xnnpack_graph import XnnpackGraph
from quant.program.calls import RecurrenceCall
from quant.program.program import shape_of


def recurrence(state: MethodLowering, node: fx.Node) -> None:
    """Emits the loop over a call's tokens."""
    call, method = RecurrenceCall.of(node), state.method
    heads, _, rows, columns = call.shape
    integer, scalar = method.integer, "Scalar"
    memory = method.state("float32", [heads, rows, columns])
    land = method.jump(state.at_start())
    method.call("aten::fill", "Scalar_out", memory, method.double(0.0), out=memory)
    land()
    operands = _operands(state, call)
    sizes = method.computed_integers([state.count, *map(integer, (heads, 1, columns))])
    result = method.tensor("float32", [state.limit, heads, 1, columns], dynamic=True)
    method.call("aten::empty", "out", sizes, method.none(), out=result)
    token, done = method.computed_integer(), method.computed_boolean()
    method.call("executorch_prim::add", scalar, integer(0), integer(0), token)
    until = method.repeat()
    given = []
    for operand in operands.values():
        row = method.tensor("float32", operand.dims, dynamic=False)
        select = "aten::select_copy", "int_out"
        method.call(*select, operand.value, integer(0), token, out=row)
        given.append(row)
    new = method.tensor("float32", [heads, 1, columns], dynamic=False)
    # The delegate writes the memory where it reads it, after all that reads it.
    segment = _segment(state, node, call, operands)
    method.delegate(segment, [*given, memory, memory, new])
    method.call("executorch_prim::et_copy_index", "tensor", result, new, token)
    method.call("executorch_prim::add", scalar, token, integer(1), token)
    method.call("executorch_prim::eq", scalar, token, state.count, done)
    until(done)
    dims = [1, state.limit, heads, columns]
    state.tensors[node] = method.view(result, "float32", dims, dynamic=1)


@dataclass(frozen=True)
class _Operand:
    """What the delegate gets of each token.

    Attributes:
        value: the method's value of all tokens, ``float32[t, ...]``.
        dims: the shape of one token's.
    """

    value: int
    dims: tuple[int, ...]


def _operands(state: MethodLowering, call: RecurrenceCall) -> dict[str, _Operand]:
    """Views of what the call reads, with tokens first and in the shapes that the delegate takes."""
    heads, groups, rows, columns = call.shape
    wanted = {
        "query": (call.query, (groups, 1, rows)),
        "key": (call.key, (groups, rows, 1)),
        "value": (call.value, (heads, 1, columns)),
    }
    if not call.constant_decay:
        by_row = len(shape_of(call.log_decay)) == 4
        wanted["decay"] = call.log_decay, (heads, rows if by_row else 1, 1)
    if call.beta is not None:
        wanted["beta"] = call.beta, (heads, 1, 1)
    method, found = state.method, {}
    for name, (node, dims) in wanted.items():
        shape = [state.limit, *dims]
        value = method.view(state.tensors[node], "float32", shape, dynamic=0)
        found[name] = _Operand(value, dims)
    return found


def _segment(
    state: MethodLowering, node: fx.Node, call: RecurrenceCall, operands: dict[str, _Operand]
) -> int:
    """Writes the program of the delegate of one token; returns the number of its segment.

    Its inputs are the operands and the memory, its outputs the memory and the token's result.
    """
    heads, _, rows, columns = call.shape
    state.begin_delegate()
    graph = state.graph
    given = {name: graph.input(operand.dims) for name, operand in operands.items()}
    memory = graph.input([heads, rows, columns])
    query, key = (_for_heads(graph, given[name], heads) for name in ("query", "key"))
    value = given["value"]
    if call.constant_decay:
        held = graph.weight(state.weight_name(node, 3), [heads, rows, 1])
    else:
        held = given["decay"]
    kept = graph.binary("XNNMultiply", memory, graph.unary("XNNExp", held))
    result: int | None = None
    if call.bonus is not None:
        result = _read_before(state, node, memory, query, key, value)
    if call.beta is not None:
        found = graph.batched(graph.reshape(key, [heads, 1, rows]), kept)
        value = graph.binary("XNNSubtract", value, found)
        value = graph.binary("XNNMultiply", value, given["beta"])
    new = graph.binary("XNNAdd", kept, graph.binary("XNNMultiply", key, value))
    if result is None:
        result = graph.batched(query, new)
    graph.output(new)
    graph.output(result)
    return state.file.payload(graph.encode())


def _for_heads(graph: XnnpackGraph, source: int, heads: int) -> int:
    """Emits a query or a key for each head of the memory: those of a group follow each other."""
    groups, *rest = graph.dims(source)
    if groups == heads:
        return source
    each = heads // groups
    ones = graph.constant(f"ones {each}", [1.0] * each, [1, each, 1, 1])
    apart = graph.reshape(source, [groups, 1, *rest])
    return graph.reshape(graph.binary("XNNMultiply", apart, ones), [heads, *rest])


def _read_before(
    state: MethodLowering, node: fx.Node, memory: int, query: int, key: int, value: int
) -> int:
    """Emits what RWKV reads, the memory before the token and the token itself: ``[h, 1, p]``."""
    graph, (heads, _, rows) = state.graph, state.graph.dims(query)
    bonus = graph.weight(state.weight_name(node, 4), [heads, 1, rows])
    own = graph.binary("XNNMultiply", query, bonus)
    own = graph.binary("XNNMultiply", own, graph.reshape(key, [heads, 1, rows]))
    own = graph.binary("XNNMultiply", value, total(graph, own))
    return graph.binary("XNNAdd", graph.batched(query, memory), own)
