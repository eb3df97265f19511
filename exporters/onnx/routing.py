"""Emits a router's choice: of each token the chosen experts and its weight of each of them.

The program has a dense weight of each expert (`quant.program.expert_ops`). The graph has the same
as two small values, named after the node ``r`` that gives the weights: ``r_experts``,
``int64[batch, t, chosen]``, and ``r_shares``, ``float32[batch, t, chosen]``. ONNX Runtime's TopK
puts the lower index first where values are equal, as the program does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import fx

from exporters.onnx.graph import GraphBuilder
from exporters.onnx.state import Lowering
from quant.program import dialect
from quant.program.program import node_argument, shape_of


class Choice(NamedTuple):
    """The names of what a router chose, and how many experts a token has."""

    experts: str
    shares: str
    chosen: int


def choice_of(node: fx.Node) -> Choice:
    """What `emit_route`, `emit_sparse_mixer` or `emit_last_choice` gives for a node."""
    route = route_of(node)
    chosen = route.args[1] if route.target is dialect.ROUTE else 2
    assert isinstance(chosen, int)
    return Choice(f"{node.name}_experts", f"{node.name}_shares", chosen)


def route_of(weights: fx.Node) -> fx.Node:
    """The node that chooses, where a node gives its weights or those of the last tokens alone."""
    return node_argument(weights, 0) if weights.target is dialect.LAST else weights


def emit_route(state: Lowering, node: fx.Node) -> None:
    """Emits a softmax over all experts and the choice of its largest shares.

    Given::

        %r = edgeforge::route(%logits, k, normalized)

    Result::

        %r_kept, %r_experts = TopK(Softmax(%logits), k)
        %r_shares = Div(%r_kept, ReduceSum(%r_kept))    # where the weights add up to 1
    """
    builder, choice = state.builder, choice_of(node)
    normalized = bool(node.args[2])
    kept = f"{node.name}_kept" if normalized else choice.shares
    softmax = builder.node("Softmax", [state.operand(node, 0)], f"{node.name}_softmax", axis=-1)
    _largest(builder, softmax, choice.chosen, kept, choice.experts)
    if normalized:
        last = builder.integers("axis_last", [-1])
        total = builder.node("ReduceSum", [kept, last], f"{node.name}_sum", keepdims=1)
        builder.node("Div", [kept, total], choice.shares)


def emit_sparse_mixer(state: Lowering, node: fx.Node) -> None:
    """Emits SparseMixer's two choices (`quant.program.expert_ops.route_sparse_mixer`).

    Given::

        %r = edgeforge::route_sparse_mixer(%logits, jitter)

    Result, once for the first choice and once for the second, whose ``left`` has -inf in place of
    the first choice's logit::

        %largest, %index = TopK(%left, 1)
        %far = Div(Sub(%largest, %logits), Max(Abs(%logits), %largest)) > 2 * jitter
        %share = GatherElements(Softmax(Where(%far, -inf, %left)), %index)
    """
    builder, choice = state.builder, choice_of(node)
    jitter = node.args[1]
    assert isinstance(jitter, float)
    name, scores = node.name, state.operand(node, 0)
    most = builder.constant(f"number_{2 * jitter!r}", np.array(2 * jitter, np.float32))
    none = builder.constant("minus_infinity", np.array(-np.inf, np.float32))
    count = shape_of(node)[-1]
    each = builder.constant(f"experts_{count}", np.arange(count, dtype=np.int64))
    magnitude = builder.node("Abs", [scores], f"{name}_magnitude")
    left = scores
    for turn in ("first", "second"):
        at = f"{name}_{turn}"
        _largest(builder, left, 1, f"{at}_largest", f"{at}_index")
        builder.node("Sub", [f"{at}_largest", scores], f"{at}_below")
        builder.node("Max", [magnitude, f"{at}_largest"], f"{at}_scale")
        builder.node("Div", [f"{at}_below", f"{at}_scale"], f"{at}_distance")
        builder.node("Greater", [f"{at}_distance", most], f"{at}_far")
        builder.node("Where", [f"{at}_far", none, left], f"{at}_candidates")
        builder.node("Softmax", [f"{at}_candidates"], f"{at}_softmax", axis=-1)
        builder.node("GatherElements", [f"{at}_softmax", f"{at}_index"], f"{at}_share", axis=-1)
        if turn == "first":
            builder.node("Equal", [each, f"{at}_index"], f"{at}_taken")
            left = builder.node("Where", [f"{at}_taken", none, scores], f"{name}_left")
    for part, whole in (("share", choice.shares), ("index", choice.experts)):
        builder.node("Concat", [f"{name}_first_{part}", f"{name}_second_{part}"], whole, axis=-1)


def emit_last_choice(state: Lowering, node: fx.Node, indices: str) -> None:
    """Emits what the last tokens chose.

    The last layer of a mixture of attention heads chooses for all tokens, because the caches need
    them, and computes the outputs of the last ones alone.

    Given::

        %l = aten::slice(%r, 1, -1, max)

    Result::

        %l_experts = GatherND(%r_experts, last_token)
        %l_shares = GatherND(%r_shares, last_token)

    Args:
        state: the graph being lowered.
        node: the slice.
        indices: the name of the last tokens' places.
    """
    every, last = choice_of(route_of(node)), choice_of(node)
    for source, made in ((every.experts, last.experts), (every.shares, last.shares)):
        state.builder.node("GatherND", [source, indices], made, batch_dims=1)


def _largest(builder: GraphBuilder, source: str, count: int, values: str, indices: str) -> None:
    number = builder.integers(f"count_{count}", [count])
    builder.node("TopK", [source, number], [values, indices], axis=-1, largest=1, sorted=1)
