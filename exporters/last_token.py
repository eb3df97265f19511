"""Makes a program compute only what the logits of the last token, or of the last few, need."""

from __future__ import annotations

import torch
from torch import fx

from quant.program.dialect import (
    BRANCHING,
    EMBEDDING,
    GATHERING,
    GET,
    LAST,
    POINTWISE,
    QUANT_EMBEDDING,
    check_lowered,
)
from quant.program.program import Program, node_argument

# A mixture of experts works token by token as a whole: what gathers and every branch before it. A
# lookup reads the tokens themselves, and there is nothing to select before it.
_MOVED = (POINTWISE | BRANCHING | GATHERING) - {EMBEDDING, QUANT_EMBEDDING}


def keep_last_token(program: Program, positions: int = 1) -> Program:
    """Selects the last position, or the last few, as early as the graph allows.

    Given::

        %y = edgeforge::linear(%x, %w)        # every position
        return %y

    Result::

        %l = aten::slice(%x, 1, -1, max)      # the last position
        %y = edgeforge::linear(%l, %w)

    A node is computed after the selection when it works position by position and all its users
    are computed after it too; a mixture of experts moves as a whole. So the head, the last norm,
    the last layer's feed-forward part and its output projection run for one token. The selection
    stops at attention, which needs every position.

    Args:
        program: the program, in the quantized dialect.
        positions: how many of the last positions are kept; a call of fewer tokens keeps all of its
            own.

    Raises:
        DialectError: the result holds an operator that no exporter knows, or gives the logits of
            other positions.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    inputs = {copies[n].name: program.inputs[n.name] for n in copies if n.op == "placeholder"}
    moved: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (
            node.op == "call_function"
            and node.target in _MOVED
            and all(user in moved for user in node.users)
        ):
            moved.add(node)
    # The parts of a split are selected one by one where the split itself is needed for all
    # positions, as the gate of a convolution is.
    moved -= {node for node in moved if node.target is GET and node_argument(node, 0) not in moved}
    slices: dict[fx.Node, fx.Node] = {}
    shorter: dict[int, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node not in moved or node.op == "output":
            continue
        for source in node.all_input_nodes:
            if source.op == "placeholder" or source in moved:
                continue
            if source not in slices:
                with graph.inserting_after(source):
                    slices[source] = graph.call_function(LAST, (source, 1, -positions, 2**63 - 1))
                _shorten(slices[source], source, positions, shorter)
            node.replace_input_with(source, slices[source])
        if hasattr(node.meta["val"], "shape"):
            _shorten(node, node, positions, shorter)
    graph.lint()
    lowered = Program(graph, inputs, program.tables, program.context, program.vocab_size)
    check_lowered(lowered, positions)
    return lowered


def _shorten(node: fx.Node, like: fx.Node, positions: int, known: dict[int, torch.Tensor]) -> None:
    """Records the shape of a node's result for the positions that are kept.

    Of several positions there are fewer where a call has fewer tokens, so that their number stays
    the dynamic one; ``meta["positions"]`` says how many there are at most.

    Args:
        node: the node.
        like: the node that has the same result for all positions.
        positions: how many positions are kept.
        known: the results that were shortened before, by identity: the experts of a mixture share
            theirs, and making one takes milliseconds.
    """
    value = like.meta["val"]
    if positions == 1:
        if id(value) not in known:
            known[id(value)] = value[:, -1:]
        value = known[id(value)]
    node.meta["val"] = value
    node.meta["positions"] = positions
