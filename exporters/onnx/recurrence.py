"""Emits recurrences over a memory as ONNX Runtime's LinearAttention, and the state that they keep.

The kernel computes what ``edgeforge::recurrence`` says, in float32, token after token, for heads
and rows that decay by themselves, and for queries and keys that several heads share. What it has
not, stands around it: a batch whose rows differ in length, states that hold nothing yet, and a
memory that is read before it is updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper
from torch import fx

from exporters.onnx import quantized
from exporters.onnx.graph import MICROSOFT, GraphBuilder
from exporters.onnx.positions import any_begins, attended_places, begins, new_length
from exporters.onnx.state import LoweredState, Lowering
from quant.program import dialect
from quant.program.calls import RecurrenceCall
from quant.program.program import node_argument, shape_of

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def emit_view(state: Lowering, node: fx.Node) -> None:
    """Emits a change between columns side by side and heads, where anything needs it."""
    if not all(_takes_columns(user, node) for user in node.users):
        _reshape(state.builder, state.operand(node, 0), shape_of(node)[2:], state.name(node))


def emit_recurrence(state: Lowering, node: fx.Node) -> None:
    """Emits a recurrence.

    Given::

        %y = edgeforge::recurrence(%q, %k, %v, %g, None, %beta, %memory, %position)

    Result::

        %past, %present = past_key_values.N.recurrent_state, present.N.recurrent_state
        %o, %present = If(any_begins)
            then: # a row of the batch begins, and may end with padding
                LinearAttention(%q, Where(attended, %k, 0), Where(attended, %v, 0),
                                Where(begins, 0, %past), Where(attended, %g, 0), %beta)
            else:
                LinearAttention(%q, %k, %v, %past, %g, %beta)
        %y = Reshape(%o)                                            # [batch, t, h, p]

    So a token that follows others pays for nothing but the kernel, and padding, which is on the
    right of rows that begin, changes no memory.

    With a bonus the memory is read before it is updated, which the kernel does not do. It gets
    keys, values and decays one token late: in front of them stands a token that changes nothing,
    and behind the queries one whose result is left out. A token's own key is added apart::

        %o, %present = If(...)          # of [%q, 0], [0, %k], [0, %v], [0, %g]: [batch, t + 1, ...]
        %own = Mul(ReduceSum(Mul(Mul(%q, %bonus), %k)), %v)
        %y = Add(Reshape(Slice(%o, 0, -1)), %own)
    """
    call, builder, name = RecurrenceCall.of(node), state.builder, state.name(node)
    heads, groups, rows, columns = call.shape
    layer = state.layer_of(call.memory)
    past, present = (f"{side}.{layer}.recurrent_state" for side in ("past_key_values", "present"))
    query, key, value = (_flat(state, each) for each in (call.query, call.key, call.value))
    decay = _decay(state, call, name)
    late = call.bonus is not None
    given: tuple[str, ...] = (query, key, value, decay)
    if late:
        given = _one_late(builder, name, given, (groups * rows, groups * rows, heads * columns))
    beta = [] if call.beta is None else [state.name(call.beta)]
    kernel = _Kernel(
        {
            "q_num_heads": groups,
            "kv_num_heads": heads,
            "scale": 1.0,
            "update_rule": "gated_delta" if beta else "gated",
        },
        given,
        beta,
    )
    found = builder.node(
        "If",
        [any_begins(builder)],
        [f"{name}_found", present],
        then_branch=_beginning(builder, name, kernel, past, late),
        else_branch=_branch(f"{name}_goes_on", [kernel.node(f"{name}_on", given, past)]),
    )
    if call.bonus is None:
        _reshape(builder, found, (heads, columns), name)
    else:
        first, last, axis = (
            builder.constant(label, np.array([at], np.int64))
            for label, at in (("from_0", 0), ("to_-1", -1), ("axis_1", 1))
        )
        builder.node("Slice", [found, first, last, axis], f"{name}_before")
        _reshape(builder, f"{name}_before", (heads, columns), f"{name}_before_heads")
        bonus = quantized.float_weight(state, call.bonus)
        _reshape(builder, query, (heads, rows), f"{name}_query")
        _reshape(builder, key, (heads, rows), f"{name}_key")
        _reshape(builder, value, (heads, columns), f"{name}_value")
        builder.node("Mul", [f"{name}_query", bonus], f"{name}_preferred")
        builder.node("Mul", [f"{name}_preferred", f"{name}_key"], f"{name}_products")
        axis_last = builder.integers("axis_last", [-1])
        builder.node("ReduceSum", [f"{name}_products", axis_last], f"{name}_share", keepdims=1)
        builder.node("Mul", [f"{name}_share", f"{name}_value"], f"{name}_own")
        builder.node("Add", [f"{name}_before_heads", f"{name}_own"], name)
    state.states.append(LoweredState(past, present, "memory", (heads, rows, columns)))


class _Kernel:
    """The kernel's node, which stands in both branches.

    Args:
        attributes: its attributes.
        given: the names of queries, keys, values and decays.
        beta: the name of how far values replace, if they do.
    """

    def __init__(
        self, attributes: dict[str, object], given: Sequence[str], beta: Sequence[str]
    ) -> None:
        self.attributes, self.given, self.beta = attributes, given, beta

    def node(self, name: str, given: Sequence[str], past: str) -> NodeProto:
        """The node with other operands; it gives ``name`` and ``name_memory``."""
        query, key, value, decay = given
        return helper.make_node(
            "LinearAttention",
            [query, key, value, past, decay, *self.beta],
            [name, f"{name}_memory"],
            name=f"LinearAttention:{name}",
            domain=MICROSOFT,
            **self.attributes,
        )


def _beginning(
    builder: GraphBuilder, name: str, kernel: _Kernel, past: str, late: bool
) -> GraphProto:
    """The branch for a batch with a row that begins."""
    zero = builder.constant("float_zero", np.array(0, np.float32))
    at, attended = f"{name}_first", attended_places(builder, late)
    query, *others = kernel.given
    clean, made = [query], []
    for label, source in zip(("key", "value", "decay"), others, strict=True):
        clean.append(f"{at}_{label}")
        made.append(helper.make_node("Where", [attended, source, zero], [clean[-1]]))
    start = [begins(builder, 3), zero, past]
    made.append(helper.make_node("Where", start, [f"{at}_state"]))
    made.append(kernel.node(at, clean, f"{at}_state"))
    return _branch(f"{name}_begins", made)


def _branch(name: str, nodes: list[NodeProto]) -> GraphProto:
    outputs = [
        helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in nodes[-1].output
    ]
    return helper.make_graph(nodes, name, [], outputs)


def _one_late(
    builder: GraphBuilder, name: str, given: Sequence[str], widths: tuple[int, int, int]
) -> tuple[str, ...]:
    """Emits queries with a token behind them, and keys, values and decays with one in front."""
    late = []
    sizes = dict(zip(("query", "key", "value", "decay"), (*widths, widths[0]), strict=True))
    for (label, width), source in zip(sizes.items(), given, strict=True):
        zeros = _zeros(builder, width)
        pair = [source, zeros] if label == "query" else [zeros, source]
        late.append(builder.node("Concat", pair, f"{name}_late_{label}", axis=1))
    return tuple(late)


def _zeros(builder: GraphBuilder, width: int) -> str:
    """Emits a token of zeros for each row: ``float32[batch, 1, width]``."""
    name = f"zeros_{width}"
    if not builder.has(name):
        new_length(builder)
        first = builder.constant("zero", np.array(0, np.int64))
        axis = builder.constant("axis_0", np.array([0], np.int64))
        builder.node("Gather", ["ids_shape", first], f"{name}_batch", axis=0)
        builder.node("Unsqueeze", [f"{name}_batch", axis], f"{name}_rows")
        rest = builder.integers(f"one_by_{width}", [1, width])
        builder.node("Concat", [f"{name}_rows", rest], f"{name}_shape", axis=0)
        zero = builder.constant("float_zero", np.array(0, np.float32))
        builder.node("Expand", [zero, f"{name}_shape"], name)
    return name


def _decay(state: Lowering, call: RecurrenceCall, name: str) -> str:
    """The name of the decays, ``float32[batch, t, h]`` or ``float32[batch, t, h * n]``."""
    if not call.constant_decay:
        return _flat(state, call.log_decay)
    builder, (heads, _, rows, _) = state.builder, call.shape
    weight = quantized.float_weight(state, call.log_decay)
    width = heads * rows
    shape = builder.integers(f"row_of_{width}", [1, 1, width])
    builder.node("Reshape", [weight, shape], f"{name}_decay_row")
    rest = builder.integers(f"only_{width}", [width])
    new_length(builder)
    builder.node("Concat", ["ids_shape", rest], f"{name}_decay_shape", axis=0)
    return builder.node("Expand", [f"{name}_decay_row", f"{name}_decay_shape"], f"{name}_decay")


def _flat(state: Lowering, node: fx.Node) -> str:
    """The name of a value whose heads stand side by side: ``float32[batch, t, h * n]``."""
    shape = shape_of(node)
    if len(shape) == 3:
        return state.name(node)
    if node.target is dialect.VIEW and len(shape_of(node_argument(node, 0))) == 3:
        return state.name(node_argument(node, 0))
    name = f"{state.name(node)}_columns"
    if not state.builder.has(name):
        _reshape(state.builder, state.name(node), (shape[2] * shape[3],), name)
    return name


def _takes_columns(user: fx.Node, view: fx.Node) -> bool:
    """Whether a recurrence reads what a view of columns was made of."""
    is_source = len(shape_of(node_argument(view, 0))) == 3
    return is_source and user.target is dialect.RECURRENCE


def _reshape(builder: GraphBuilder, source: str, columns: Sequence[int], name: str) -> str:
    """Emits ``[batch, t, ...] -> [batch, t, *columns]``."""
    shape = builder.integers("as_" + "x".join(map(str, columns)), [0, 0, *columns])
    return builder.node("Reshape", [source, shape], name)
