"""`Program`: a traced decoder as a graph of ``edgeforge::`` operators with named inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

InputKind = Literal["tokens", "position", "weight", "table", "cache", "recent", "memory"]


@dataclass(frozen=True)
class Input:
    """What one placeholder of the graph stands for.

    Attributes:
        kind: the caller gives tokens and position at every call; weights come from a store or a
            checkpoint; tables are constants of the program; caches, recent tokens and memories are
            states between calls (`quant.program.states`).
        name: the weight's, table's or state's name.
        part: the weight's stored part: ``value`` when it is float; ``codes``, ``scale``,
            ``zero_point``, a palette's ``lut`` or ``input_scale`` otherwise.
    """

    kind: InputKind
    name: str
    part: str = "value"


@dataclass(frozen=True)
class Program:
    """One traced decoder.

    Attributes:
        graph: placeholders first, then calls, then one output: ``float32[1, t, vocab]``. Every
            node's ``meta["val"]`` is a fake tensor that gives its shape and dtype.
        inputs: what each placeholder stands for, by node name.
        tables: values of the inputs of kind ``table``, by table name.
        context: the caches' length, tokens.
        vocab_size: the logits' width.
    """

    graph: fx.Graph
    inputs: Mapping[str, Input]
    tables: Mapping[str, torch.Tensor]
    context: int
    vocab_size: int

    def placeholders(self, kind: InputKind) -> Iterator[tuple[fx.Node, Input]]:
        """The placeholders of one kind, in the graph's order."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and self.inputs[node.name].kind == kind:
                yield node, self.inputs[node.name]

    def output(self) -> fx.Node:
        """The node that computes the logits."""
        result = self.graph.output_node().args[0]
        node = result[0] if isinstance(result, tuple | list) else result
        assert isinstance(node, fx.Node)
        return node


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Returns a node's shape, with -1 for the dynamic number of tokens."""
    value = node.meta["val"]
    return tuple(dim if isinstance(dim, int) else -1 for dim in value.shape)


def node_argument(node: fx.Node, index: int) -> fx.Node:
    """Returns the argument at a position where the dialect guarantees a node."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node), f"{node.name}: argument {index} is {argument!r}"
    return argument
