"""The branches of a mixture of experts: how a program holds them, and how exporters find them.

A branch is what one expert computes for the tokens that chose it: a call of ``chosen_tokens``, the
calls after it, and its place in the ``combine`` that adds up the branches of a layer. Inside a
branch only the branch's own values, weights and tables are read, so an exporter may leave a branch
out of a call in which no token chose its expert.

The number of tokens in a branch depends on the router. It is at most the number of all tokens, and
shapes in ``meta["val"]`` state that one: memory that is planned by them suffices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from quant.program.dialect import CHOSEN, COMBINE, GELU, GET, LINEAR, MUL, SILU, SPLIT
from quant.program.program import Program, node_argument

_EXPERTS = torch.ops.edgeforge.experts.default


@dataclass(frozen=True)
class Branch:
    """What one expert computes.

    Attributes:
        expert: the expert's index.
        chosen: the call of ``chosen_tokens`` that begins the branch.
        nodes: the calls after it, in the program's order, up to ``result``.
        result: the call whose value ``combine`` reads.
    """

    expert: int
    chosen: fx.Node
    nodes: tuple[fx.Node, ...]
    result: fx.Node


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    Attributes:
        source: what the experts read, ``float[1, t, i]``.
        weights: each token's weight of each expert, ``float[1, t, E]``.
        branches: the experts' branches, by index.
        combine: the call that adds them up.
    """

    source: fx.Node
    weights: fx.Node
    branches: tuple[Branch, ...]
    combine: fx.Node


def expand(graph: fx.Graph, stacked: Mapping[str, str]) -> dict[str, str]:
    """Replaces every call of ``experts`` of a traced graph by its branches, in place.

    The placeholders of the stacked matrices give way to one for each expert's matrix. A graph is
    traced with the stacked ones because tracing takes time for each parameter.

    For each expert e::

        %c = edgeforge::chosen_tokens(%x, %weights, e)
        %p = edgeforge::linear(%c, %gate_up_e)
        %s = aten::split_with_sizes(%p, [f, f], -1)
        %a = aten::silu(getitem(%s, 0))
        %r = edgeforge::linear(aten::mul(%a, getitem(%s, 1)), %down_e)

    and after the last one ``edgeforge::combine(%weights, [%r, ...])``.

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
        if node.target is _EXPERTS:
            gate_up, down = (node_argument(node, index) for index in (2, 3))
            matrices = _matrices(graph, (gate_up, down), stacked, names)
            with graph.inserting_before(node):
                made = _branches(graph, node, matrices)
            node.replace_all_uses_with(made)
            for gone in (node, gate_up, down):
                graph.erase_node(gone)
    graph.lint()
    return names


def mixtures(program: Program) -> Mapping[fx.Node, Mixture]:
    """Returns a program's mixtures by their ``combine`` calls, in the program's order."""
    return {node: mixture_of(node) for node in program.graph.nodes if node.target is COMBINE}


def _matrices(
    graph: fx.Graph,
    both: tuple[fx.Node, fx.Node],
    stacked: Mapping[str, str],
    names: dict[str, str],
) -> list[tuple[fx.Node, fx.Node]]:
    """Makes a placeholder for each matrix of each expert, and records its name in ``names``."""
    made = []
    values = [node.meta["val"][0] for node in both]
    with graph.inserting_before(both[0]):
        for expert in range(both[0].meta["val"].shape[0]):
            pair = []
            for node, value in zip(both, values, strict=True):
                at, _, part = stacked[node.name].rpartition(".")
                name = f"{at}.{expert}.{part}.weight"
                matrix = graph.placeholder(f"p_{name.replace('.', '_')}")
                matrix.meta["val"] = value
                names[matrix.name] = name
                pair.append(matrix)
            made.append((pair[0], pair[1]))
    return made


def _branches(
    graph: fx.Graph, node: fx.Node, matrices: Sequence[tuple[fx.Node, fx.Node]]
) -> fx.Node:
    x, weights, activation = node_argument(node, 0), node_argument(node, 1), node.args[4]
    (out_rows, width), value = matrices[0][1].meta["val"].shape, x.meta["val"]
    both, half, out = (
        value.new_empty(*value.shape[:-1], columns) for columns in (2 * width, width, out_rows)
    )

    def call(target: object, *arguments: object, like: object) -> fx.Node:
        made = graph.call_function(target, tuple(arguments))  # type: ignore[arg-type]
        made.meta["val"] = like
        return made

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


def mixture_of(node: fx.Node) -> Mixture:
    """Returns the mixture that a call of ``combine`` adds up."""
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
        if node.target is CHOSEN:
            begin = node
            continue
        found.add(node)
        queue += node.all_input_nodes
    assert begin is not None
    order = sorted(found)  # nodes of a graph compare by their places in it
    expert = begin.args[2]
    assert isinstance(expert, int)
    return Branch(expert, begin, tuple(order), result)
