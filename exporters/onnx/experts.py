"""Emits a mixture's experts, each for the rows of the tokens that chose it.

Every token has a row for each expert that it chose. The rows of a call are sorted by their experts
and split, so that each expert's operations see its own rows alone, and none where no token chose
it: ONNX Runtime's kernels return at once for no rows, and read no weight. No subgraph is needed,
and the operations are those of any other product.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from torch import fx

from exporters.errors import ExportError
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.routing import choice_of
from exporters.onnx.state import Lowering
from quant.program import dialect
from quant.program.expert_branches import mixtures
from quant.program.program import shape_of


def find_mixtures(state: Lowering) -> None:
    """Notes the program's mixtures and their branches.

    Raises:
        ExportError: something stands between a router and its experts.
    """
    for combine, mixture in mixtures(state.program).items():
        if mixture.weights.target not in dialect.ROUTES:
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

        %ids = Reshape(%r_experts, [-1])                 # int64[tokens * k]
        _, %order = TopK(%ids, all of them, smallest)    # equal ids keep their order
        %rows = Gather(Reshape(%x, [-1, columns]), Div(%order, k))
        %counts = ReduceSum(Cast(Equal(%ids, experts)))  # int64[E]
        %c0, %c1, ... = Split(%rows, %counts)
    """
    mixture = state.mixtures[node]
    if node is not mixture.branches[0].chosen:
        return
    builder, name = state.builder, mixture.combine.name
    choice, width = choice_of(mixture.weights), shape_of(mixture.source)[-1]
    flat = builder.integers("any_number", [-1])
    ids = builder.node("Reshape", [choice.experts, flat], f"{name}_ids")
    order = _order(builder, ids, f"{name}_order")
    each = builder.integers(f"count_{choice.chosen}", [choice.chosen])
    tokens = builder.node("Div", [order, each], f"{name}_tokens")
    shape = builder.integers(f"rows_of_{width}", [-1, width])
    builder.node("Reshape", [state.name(mixture.source), shape], f"{name}_source")
    builder.node("Gather", [f"{name}_source", tokens], f"{name}_rows", axis=0)
    count = shape_of(mixture.weights)[-1]
    experts = builder.constant(f"column_{count}", np.arange(count, dtype=np.int64)[:, None])
    builder.node("Equal", [ids, experts], f"{name}_is_chosen")
    builder.node("Cast", [f"{name}_is_chosen"], f"{name}_ones", to=TensorProto.INT64)
    one = builder.integers("axis_1", [1])
    builder.node("ReduceSum", [f"{name}_ones", one], f"{name}_counts", keepdims=0)
    rows = [f"{name}_rows_{branch.expert}" for branch in mixture.branches]
    builder.node("Split", [f"{name}_rows", f"{name}_counts"], rows, axis=0)
    for branch, given in zip(mixture.branches, rows, strict=True):
        state.names[branch.chosen] = given


def emit_combine(state: Lowering, node: fx.Node) -> None:
    """Emits the sum of what the experts computed, times each token's weights.

    Given::

        %y = edgeforge::combine(%r, [%e0, %e1, ...])

    Result::

        _, %places = TopK(%order, all of them, smallest)     # where each token's own rows are
        %own = Reshape(Gather(Concat(%e0, %e1, ...), %places), [batch, t, k, columns])
        %y = ReduceSum(Mul(%own, Unsqueeze(%r_shares, -1)), -2)
    """
    builder, name, mixture = state.builder, state.name(node), state.mixtures[node]
    choice, width = choice_of(mixture.weights), shape_of(node)[-1]
    results = [state.name(branch.result) for branch in mixture.branches]
    builder.node("Concat", results, f"{name}_results", axis=0)
    places = _order(builder, f"{name}_order", f"{name}_places")
    builder.node("Gather", [f"{name}_results", places], f"{name}_sorted", axis=0)
    builder.node("Shape", [choice.shares], f"{name}_tokens_and_chosen")
    columns = builder.integers(f"width_{width}", [width])
    builder.node("Concat", [f"{name}_tokens_and_chosen", columns], f"{name}_shape", axis=0)
    builder.node("Reshape", [f"{name}_sorted", f"{name}_shape"], f"{name}_own")
    last = builder.integers("axis_last", [-1])
    builder.node("Unsqueeze", [choice.shares, last], f"{name}_factors")
    builder.node("Mul", [f"{name}_own", f"{name}_factors"], f"{name}_weighted")
    before_last = builder.integers("axis_before_last", [-2])
    builder.node("ReduceSum", [f"{name}_weighted", before_last], name, keepdims=0)


def _order(builder: GraphBuilder, numbers: str, name: str) -> str:
    """Emits the places of numbers ``int64[n]`` in ascending order, equal ones as they stand."""
    length = builder.node("Shape", [numbers], f"{name}_length")
    outputs = [f"{name}_sorted_numbers", name]
    builder.node("TopK", [numbers, length], outputs, axis=0, largest=0, sorted=1)
    return name
