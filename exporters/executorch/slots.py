"""Emits the slots of a mixture of attention heads: where each token's experts keep their rows.

Between kernels a token has a row for each of its slots, ``[1, t * k, heads * d]``, so that an
expert's rows are whole ones. Which row is an expert's is computed once for all experts of a
router, ``t`` being counted from 0::

    chosen = ne(select_copy(weights, 0, 0), 0)            # bool[t, E]
    rows = cumsum(chosen, 1) + firsts                     # int64[t, E]; firsts[t] = t * k - 1

A row that no expert fills stays zero. Attention takes the heads of a token outermost,
``[1, t, heads * k, d]``; delegates permute the rows to this layout and back.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import fx

from exporters.executorch.blobs import Blob
from exporters.executorch.method import SCALAR_TYPES
from exporters.executorch.state import MethodLowering
from quant.program.expert_branches import Mixture


def row_numbers(state: MethodLowering, mixture: Mixture) -> int:
    """The row of each token's slot of each expert, where it chose the expert: ``int64[t, E]``."""
    node = mixture.weights
    if node not in state.slot_rows:
        state.slot_rows[node] = _row_numbers(state, node, mixture.slots[0])
    return state.slot_rows[node]


def _row_numbers(state: MethodLowering, node: fx.Node, chosen: int) -> int:
    method, integer = state.method, state.method.integer
    _, tokens, experts = state.dims(node)
    dims, int64 = [tokens, experts], SCALAR_TYPES["int64"][0]
    weights = method.tensor("float32", dims, dynamic=True)
    select = "aten::select_copy", "int_out"
    method.call(*select, state.tensors[node], integer(0), integer(0), out=weights)
    taken = method.tensor("bool", dims, dynamic=True)
    method.call("aten::ne", "Scalar_out", weights, method.double(0.0), out=taken)
    counts = method.tensor("int64", dims, dynamic=True)
    method.call("aten::cumsum", "out", taken, integer(1), integer(int64), out=counts)
    key = f"rows before each token's {chosen} slots"
    data = np.arange(-1, state.limit * chosen - 1, chosen, dtype=np.int64).tobytes()
    all_firsts = method.constant(
        "int64", [state.limit, 1], state.file.constant(key, Blob(data)), key
    )
    firsts = method.tensor("int64", [tokens, 1], dynamic=True)
    state.slice(all_firsts, 0, integer(0), tokens_of(state, node), firsts)
    rows = method.tensor("int64", dims, dynamic=True)
    method.call("aten::add", "out", counts, firsts, integer(1), out=rows)
    return rows


def tokens_of(state: MethodLowering, node: fx.Node) -> int:
    """The method's value of how many tokens a node has in a run."""
    method = state.method
    if not state.is_dynamic(node):
        return method.integer(state.dims(node)[1])
    if "positions" not in node.meta:
        return state.count
    count = method.computed_integer()
    method.call("aten::sym_size", "int", state.tensors[node], method.integer(1), count)
    return count


def zeros(state: MethodLowering, mixture: Mixture, width: int) -> int:
    """Emits zeros for the rows of a mixture's results: one a token, or one for each of its slots.

    Returns:
        The method's value ``float32[1, t, width]`` or ``float32[1, t * k, width]``.
    """
    method, node = state.method, mixture.weights
    slots = mixture.slots[0] if mixture.fills_slots else 1
    rows = tokens_of(state, node)
    if slots > 1:
        tokens, rows = rows, method.computed_integer()
        method.call("executorch_prim::mul", "Scalar", tokens, method.integer(slots), rows)
    sizes = method.computed_integers([method.integer(1), rows, method.integer(width)])
    made = method.tensor("float32", [1, state.dims(node)[1] * slots, width], dynamic=True)
    method.call("aten::full", "out", sizes, method.double(0.0), out=made)
    return made


def give_heads(state: MethodLowering, node: fx.Node, rows: int, mixture: Mixture) -> None:
    """Makes delegates that read the slots permute them: to heads first, as attention takes them.

    Args:
        state: the method.
        node: the call of ``slots``.
        rows: the method's value ``float32[1, t * k, heads * d]``.
        mixture: the queries of a mixture of heads.
    """
    chosen, heads = mixture.slots
    _, tokens, width = state.dims(node)
    dims = [1, tokens * chosen, width // chosen]
    state.deferred[node] = partial(_heads_first, state, rows, dims, heads, chosen)


def _heads_first(state: MethodLowering, rows: int, dims: list[int], heads: int, chosen: int) -> int:
    graph, width = state.graph, dims[2] // heads
    by_slot = graph.reshape(state.given(rows, dims), [-1, chosen, heads, width])
    return graph.reshape(graph.transpose(by_slot, [0, 2, 1, 3]), [1, -1, chosen * dims[2]])


def slots_first(state: MethodLowering, mixture: Mixture) -> int:
    """Emits a delegate that makes a row for each slot of what attention gives.

    Returns:
        The method's value ``float32[1, t * k, heads * d]``.
    """
    chosen, heads = mixture.slots
    width = state.dims(mixture.source)[2] // (chosen * heads)
    state.begin_delegate()
    graph, source = state.graph, state.value(mixture.source)
    by_head = graph.reshape(source, [-1, heads, chosen, width])
    rows = graph.reshape(graph.transpose(by_head, [0, 2, 1, 3]), [1, -1, heads * width])
    made = state.leave(rows, dynamic=True)
    state.run_delegate()
    return made
