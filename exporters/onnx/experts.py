"""Emits a mixture's experts, each for the rows of the tokens that chose it.

Every token has a row for each expert that it chose. The rows of a call are sorted by their experts
and split, so that each expert's operations see its own rows alone, and none where no token chose
it: ONNX Runtime's kernels return at once for no rows, and read no weight. No subgraph is needed,
and the operations are those of any other product.

A mixture of attention heads sorts the same way, once for queries and outputs: a token's slots stand
in the order in which its router gives the experts, and its own rows are its slots.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from torch import fx

from exporters.errors import ExportError
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.routing import choice_of, route_of
from exporters.onnx.state import Lowering
from quant.program import dialect
from quant.program.expert_branches import Mixture, mixtures
from quant.program.program import shape_of


def find_mixtures(state: Lowering) -> None:
    """Notes the program's mixtures and their branches.

    Raises:
        ExportError: something stands between a router and its experts.
    """
    for combine, mixture in mixtures(state.program).items():
        if route_of(mixture.weights).target not in dialect.ROUTES:
            raise ExportError(
                f"the ONNX target cannot lower {combine.name}: its weights of the experts come "
                f"from {mixture.weights.target}"
            )
        state.mixtures[combine] = mixture
        for branch in mixture.branches:
            state.mixtures[branch.chosen] = mixture
            state.in_branches.update(branch.nodes)


def emit_chosen(state: Lowering, node: fx.Node) -> None:
    """Emits the rows of all experts of a mixture, before the first of its branches.

    Given, for each expert e::

        %c = edgeforge::chosen_tokens(%x, %r, e)

    Result, where k is the number of experts that a token has::

        %r_ids = Reshape(%r_experts, [-1])                     # int64[tokens * k]
        _, %r_order = TopK(%r_ids, all of them, smallest)      # equal ids keep their order
        %r_counts = ReduceSum(Cast(Equal(%r_ids, experts)))    # int64[E]
        %rows = Gather(Reshape(%x, [-1, columns]), Div(%r_order, k))
        %c0, %c1, ... = Split(%rows, %r_counts)

    Given ``edgeforge::chosen_slots(%x, %r, e, k, heads)``, the rows are the slots::

        %slots = Reshape(Transpose(Reshape(%x, [-1, heads, k, width])), [-1, heads * width])
        %rows = Gather(%slots, %r_order)
    """
    mixture = state.mixtures[node]
    if node is not mixture.branches[0].chosen:
        return
    builder, name = state.builder, mixture.combine.name
    order, counts = _sorting(builder, mixture)
    emit_rows = _emit_slot_rows if mixture.reads_slots else _emit_token_rows
    emit_rows(state, mixture, order)
    rows = [f"{name}_rows_{branch.expert}" for branch in mixture.branches]
    builder.node("Split", [f"{name}_rows", counts], rows, axis=0)
    for branch, given in zip(mixture.branches, rows, strict=True):
        state.names[branch.chosen] = given


def emit_combine(state: Lowering, node: fx.Node) -> None:
    """Emits the sum of what the experts computed, times each token's weights.

    Given::

        %y = edgeforge::combine(%r, [%e0, %e1, ...])

    Result::

        _, %r_places = TopK(%r_order, all of them, smallest)   # where each token's own rows are
        %own = Reshape(Gather(Concat(%e0, %e1, ...), %r_places), [batch, t, k, columns])
        %y = ReduceSum(Mul(%own, Unsqueeze(%r_shares, -1)), -2)
    """
    builder, name = state.builder, state.name(node)
    choice = choice_of(state.mixtures[node].weights)
    _emit_own(state, node, [shape_of(node)[-1]])
    last = builder.integers("axis_last", [-1])
    builder.node("Unsqueeze", [choice.shares, last], f"{name}_factors")
    builder.node("Mul", [f"{name}_own", f"{name}_factors"], f"{name}_weighted")
    before_last = builder.integers("axis_before_last", [-2])
    builder.node("ReduceSum", [f"{name}_weighted", before_last], name, keepdims=0)


def emit_slots(state: Lowering, node: fx.Node) -> None:
    """Emits what each token's experts computed, side by side and head by head.

    Given::

        %y = edgeforge::slots(%r, [%e0, %e1, ...], k, heads)

    Result, with ``%r_places`` as of `emit_combine`::

        %own = Reshape(Gather(Concat(%e0, %e1, ...), %r_places), [batch, t, k, heads, width])
        %y = Reshape(Transpose(%own), [batch, t, heads * k * width])
    """
    builder, name = state.builder, state.name(node)
    chosen, heads = state.mixtures[node].slots
    width = shape_of(node)[-1] // (chosen * heads)
    _emit_own(state, node, [heads, width])
    builder.node("Transpose", [f"{name}_own"], f"{name}_by_head", perm=[0, 1, 3, 2, 4])
    together = builder.integers("all_columns", [0, 0, -1])
    builder.node("Reshape", [f"{name}_by_head", together], name)


def _sorting(builder: GraphBuilder, mixture: Mixture) -> tuple[str, str]:
    """Emits the order of a choice's rows by expert, and how many rows each expert has.

    The queries and the outputs of a mixture of heads have them in common, where both are computed
    for the same tokens.
    """
    choice, name = choice_of(mixture.weights), mixture.weights.name
    if builder.has(f"{name}_counts"):
        return f"{name}_order", f"{name}_counts"
    flat = builder.integers("any_number", [-1])
    ids = builder.node("Reshape", [choice.experts, flat], f"{name}_ids")
    order = _order(builder, ids, f"{name}_order")
    count = shape_of(mixture.weights)[-1]
    experts = builder.constant(f"column_{count}", np.arange(count, dtype=np.int64)[:, None])
    builder.node("Equal", [ids, experts], f"{name}_is_chosen")
    builder.node("Cast", [f"{name}_is_chosen"], f"{name}_ones", to=TensorProto.INT64)
    one = builder.integers("axis_1", [1])
    return order, builder.node("ReduceSum", [f"{name}_ones", one], f"{name}_counts", keepdims=0)


def _emit_token_rows(state: Lowering, mixture: Mixture, order: str) -> None:
    """Emits a token's activations as often as it chose an expert, sorted by the experts."""
    builder, name, width = state.builder, mixture.combine.name, shape_of(mixture.source)[-1]
    chosen = choice_of(mixture.weights).chosen
    each = builder.integers(f"count_{chosen}", [chosen])
    tokens = builder.node("Div", [order, each], f"{name}_tokens")
    shape = builder.integers(f"rows_of_{width}", [-1, width])
    builder.node("Reshape", [state.name(mixture.source), shape], f"{name}_source")
    builder.node("Gather", [f"{name}_source", tokens], f"{name}_rows", axis=0)


def _emit_slot_rows(state: Lowering, mixture: Mixture, order: str) -> None:
    """Emits the slots of all tokens, sorted by the experts that have them."""
    builder, name, (chosen, heads) = state.builder, mixture.combine.name, mixture.slots
    width = shape_of(mixture.source)[-1] // (chosen * heads)
    apart = builder.integers(f"slots_{heads}_{chosen}_{width}", [-1, heads, chosen, width])
    shape = builder.integers(f"rows_of_{heads * width}", [-1, heads * width])
    builder.node("Reshape", [state.name(mixture.source), apart], f"{name}_apart")
    builder.node("Transpose", [f"{name}_apart"], f"{name}_by_slot", perm=[0, 2, 1, 3])
    builder.node("Reshape", [f"{name}_by_slot", shape], f"{name}_slots")
    builder.node("Gather", [f"{name}_slots", order], f"{name}_rows", axis=0)


def _emit_own(state: Lowering, node: fx.Node, columns: list[int]) -> None:
    """Emits ``NAME_own``, each token's own results, ``float[batch, t, k, *columns]``."""
    builder, name, mixture = state.builder, state.name(node), state.mixtures[node]
    choice, given = choice_of(mixture.weights), mixture.weights.name
    results = [state.name(branch.result) for branch in mixture.branches]
    builder.node("Concat", results, f"{name}_results", axis=0)
    places = f"{given}_places"
    if not builder.has(places):
        _order(builder, f"{given}_order", places)
    builder.node("Gather", [f"{name}_results", places], f"{name}_sorted", axis=0)
    if not builder.has(f"{given}_tokens_and_chosen"):
        builder.node("Shape", [choice.shares], f"{given}_tokens_and_chosen")
    widths = builder.integers("width_" + "_".join(map(str, columns)), columns)
    builder.node("Concat", [f"{given}_tokens_and_chosen", widths], f"{name}_shape", axis=0)
    builder.node("Reshape", [f"{name}_sorted", f"{name}_shape"], f"{name}_own")


def _order(builder: GraphBuilder, numbers: str, name: str) -> str:
    """Emits the places of numbers ``int64[n]`` in ascending order, equal ones as they stand."""
    length = builder.node("Shape", [numbers], f"{name}_length")
    outputs = [f"{name}_sorted_numbers", name]
    builder.node("TopK", [numbers, length], outputs, axis=0, largest=0, sorted=1)
    return name
