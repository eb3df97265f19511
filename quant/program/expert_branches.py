"""The branches of a mixture of experts: how a program holds them, and how exporters find them.

A branch is what one expert computes for the tokens that chose it: a call of ``chosen_tokens``, the
calls after it, and its place in the ``combine`` that adds up the branches of a layer. Inside a
branch only the branch's own values, weights and tables are read, so an exporter may leave a branch
out of a call in which no token chose its expert.

A mixture of attention heads is two such groups of branches with one choice of experts: those of the
queries end in ``slots``, which keeps the results of a token's experts apart, and those of the
outputs begin with ``chosen_slots``, an expert's own part of what attention gives. Attention, its
keys and its values are one for all experts.

The number of tokens in a branch depends on the router. It is at most the number of all tokens, and
shapes in ``meta["val"]`` state that one: memory that is planned by them suffices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from quant.program.dialect import (
    BRANCHING,
    CHOSEN,
    CHOSEN_SLOTS,
    COMBINE,
    GATHERING,
    GELU,
    GET,
    LINEAR,
    MUL,
    SILU,
    SLOTS,
    SPLIT,
)
from quant.program.program import Program, node_argument

_EXPERTS = torch.ops.edgeforge.experts.default
_QUERIES = torch.ops.edgeforge.expert_queries.default
_OUTPUTS = torch.ops.edgeforge.expert_outputs.default


@dataclass(frozen=True)
class Branch:
    """What one expert computes.

    Attributes:
        expert: the expert's index.
        chosen: the call of ``chosen_tokens`` or ``chosen_slots`` that begins the branch.
        nodes: the calls after it, in the program's order, up to ``result``.
        result: the call whose value ``combine`` or ``slots`` reads.
    """

    expert: int
    chosen: fx.Node
    nodes: tuple[fx.Node, ...]
    result: fx.Node


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer: of its feed-forward part, of its queries, or of its outputs.

    Attributes:
        source: what the experts read, ``float[1, t, i]``; where each reads its own slots, those of
            all, ``float[1, t, chosen * i]``.
        weights: each token's weight of each expert, ``float[1, t, E]``.
        branches: the experts' branches, by index.
        combine: the call that adds them up, or places them side by side.
    """

    source: fx.Node
    weights: fx.Node
    branches: tuple[Branch, ...]
    combine: fx.Node

    @property
    def reads_slots(self) -> bool:
        """Whether each expert reads its own slots, as the outputs of a mixture of heads do."""
        return self.branches[0].chosen.target is CHOSEN_SLOTS

    @property
    def fills_slots(self) -> bool:
        """Whether the results stand side by side, as the queries of a mixture of heads do."""
        return self.combine.target is SLOTS

    @property
    def slots(self) -> tuple[int, int]:
        """How many slots a token has and how many heads a slot; (0, 0) where there are none."""
        if self.fills_slots:
            chosen, heads = self.combine.args[2:4]
        elif self.reads_slots:
            chosen, heads = self.branches[0].chosen.args[3:5]
        else:
            chosen = heads = 0
        assert isinstance(chosen, int) and isinstance(heads, int)
        return chosen, heads


def expand(graph: fx.Graph, stacked: Mapping[str, str]) -> dict[str, str]:
    """Replaces every call that stands for experts in a traced graph by branches, in place.

    The placeholders of the stacked matrices give way to one for each expert's matrix. A graph is
    traced with the stacked ones because tracing takes time for each parameter.

    For each expert e::

        %c = edgeforge::chosen_tokens(%x, %weights, e)
        %p = edgeforge::linear(%c, %gate_up_e)
        %s = aten::split_with_sizes(%p, [f, f], -1)
        %a = aten::silu(getitem(%s, 0))
        %r = edgeforge::linear(aten::mul(%a, getitem(%s, 1)), %down_e)

    and after the last one ``edgeforge::combine(%weights, [%r, ...])``. ``expert_queries`` and
    ``expert_outputs`` become one product each for an expert: of ``chosen_tokens``, gathered by
    ``slots``, and of ``chosen_slots``, gathered by ``combine``.

    Args:
        graph: the traced graph.
        stacked: the names of the stacked matrices, ``...experts.gate_up_proj``, by the names of
            their placeholders.

    Returns:
        The names of the experts' own matrices, ``...experts.7.gate_up_proj.weight``, by the names
        of their placeholders.
    """
    names: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target not in (_EXPERTS, _QUERIES, _OUTPUTS):
            continue
        places = (2, 3) if node.target is _EXPERTS else (2,)
        given = [node_argument(node, index) for index in places]
        matrices = _matrices(graph, given, stacked, names)
        with graph.inserting_before(node):
            if node.target is _EXPERTS:
                made = _branches(graph, node, matrices)
            else:
                made = _head_branches(graph, node, [each for (each,) in matrices])
        node.replace_all_uses_with(made)
        for gone in (node, *given):
            graph.erase_node(gone)
    graph.lint()
    return names


def mixtures(program: Program) -> Mapping[fx.Node, Mixture]:
    """Returns a program's mixtures by the calls that gather branches, in the program's order."""
    return {node: mixture_of(node) for node in program.graph.nodes if node.target in GATHERING}


def _matrices(
    graph: fx.Graph,
    given: Sequence[fx.Node],
    stacked: Mapping[str, str],
    names: dict[str, str],
) -> list[list[fx.Node]]:
    """Makes a placeholder for each matrix of each expert, and records its name in ``names``."""
    made = []
    values = [node.meta["val"][0] for node in given]
    with graph.inserting_before(given[0]):
        for expert in range(given[0].meta["val"].shape[0]):
            own = []
            for node, value in zip(given, values, strict=True):
                at, _, part = stacked[node.name].rpartition(".")
                name = f"{at}.{expert}.{part}.weight"
                matrix = graph.placeholder(f"p_{name.replace('.', '_')}")
                matrix.meta["val"] = value
                names[matrix.name] = name
                own.append(matrix)
            made.append(own)
    return made


def _branches(graph: fx.Graph, node: fx.Node, matrices: Sequence[Sequence[fx.Node]]) -> fx.Node:
    x, weights, activation = node_argument(node, 0), node_argument(node, 1), node.args[4]
    (out_rows, width), value = matrices[0][1].meta["val"].shape, x.meta["val"]
    both, half, out = (
        value.new_empty(*value.shape[:-1], columns) for columns in (2 * width, width, out_rows)
    )

    call = partial(_call, graph)
    results = []
    for expert, (expanding, contracting) in enumerate(matrices):
        chosen = call(CHOSEN, x, weights, expert, like=value)
        product = call(LINEAR, chosen, expanding, like=both)
        parts = call(SPLIT, product, [width, width], -1, like=[half, half])
        gate, up = (call(GET, parts, index, like=half) for index in range(2))
        if activation == "silu":
            gate = call(SILU, gate, like=half)
        else:
            gate = call(GELU, gate, "tanh" if activation == "gelu_tanh" else "none", like=half)
        results.append(call(LINEAR, call(MUL, gate, up, like=half), contracting, like=out))
    return call(COMBINE, weights, results, like=out)


def _head_branches(graph: fx.Graph, node: fx.Node, matrices: Sequence[fx.Node]) -> fx.Node:
    """Writes the products of a mixture of heads: of all experts' queries, or of their outputs."""
    x, weights, (chosen, heads) = node_argument(node, 0), node_argument(node, 1), node.args[3:5]
    value, (out_rows, columns) = x.meta["val"], matrices[0].meta["val"].shape
    read, out = (value.new_empty(*value.shape[:-1], width) for width in (columns, out_rows))
    call = partial(_call, graph)
    results = []
    for expert, matrix in enumerate(matrices):
        if node.target is _QUERIES:
            own = call(CHOSEN, x, weights, expert, like=read)
        else:
            own = call(CHOSEN_SLOTS, x, weights, expert, chosen, heads, like=read)
        results.append(call(LINEAR, own, matrix, like=out))
    if node.target is _QUERIES:
        return call(SLOTS, weights, results, chosen, heads, like=node.meta["val"])
    return call(COMBINE, weights, results, like=out)


def _call(graph: fx.Graph, target: object, *arguments: object, like: object) -> fx.Node:
    made = graph.call_function(target, arguments)  # type: ignore[arg-type]
    made.meta["val"] = like
    return made


def mixture_of(node: fx.Node) -> Mixture:
    """Returns the mixture whose branches a call of ``combine`` or ``slots`` gathers."""
    results = node.args[1]
    assert isinstance(results, list | tuple)
    branches = tuple(_branch(result) for result in results if isinstance(result, fx.Node))
    source = node_argument(branches[0].chosen, 0)
    return Mixture(source, node_argument(node, 0), branches, node)


def _branch(result: fx.Node) -> Branch:
    """Follows a branch from its result to the call that begins it."""
    found: set[fx.Node] = set()
    begin: fx.Node | None = None
    queue = [result]
    while queue:
        node = queue.pop()
        if node in found or node.op != "call_function":
            continue
        if node.target in BRANCHING:
            begin = node
            continue
        found.add(node)
        queue += node.all_input_nodes
    assert begin is not None
    order = sorted(found)  # nodes of a graph compare by their places in it
    expert = begin.args[2]
    assert isinstance(expert, int)
    return Branch(expert, begin, tuple(order), result)
