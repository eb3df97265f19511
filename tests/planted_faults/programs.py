"""Programs with a fault in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from edgeforge.families.spec import RopeSpec
from edgeforge.model.rope import tables
from quant.program import dialect
from quant.program.program import Program, node_argument


def with_graph(program: Program, change: Callable[[Program], None]) -> Program:
    """A copy of a program whose graph is changed."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    inputs = {copies[n].name: program.inputs[n.name] for n in copies if n.op == "placeholder"}
    copied = Program(graph, inputs, program.tables, program.context, program.vocab_size)
    change(copied)
    graph.lint()
    return copied


def with_rope(program: Program, rope: RopeSpec, first: int = 0) -> Program:
    """A program with another rotary embedding from a position on."""
    found = {}
    for name, other in zip(("rope_cos", "rope_sin"), tables(rope, program.context), strict=True):
        own = program.tables[name]
        found[name] = torch.cat([own[:first], other[first:]])
    return replace(program, tables=found)


def with_window(program: Program, window: int) -> Program:
    """A program whose attentions have another window."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.ATTENTION):
            node.args = (*node.args[:6], window, *node.args[7:])

    return with_graph(program, change)


def with_epsilon(program: Program, epsilon: float) -> Program:
    """A program whose norms add another epsilon."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.RMS_NORM):
            node.args = (*node.args[:2], epsilon)

    return with_graph(program, change)


def with_gates_swapped(program: Program) -> Program:
    """A program that applies SiLU to up, in place of the gate."""

    def change(copied: Program) -> None:
        for silu in _calls(copied, dialect.SILU):
            (product,) = silu.users
            gate = node_argument(silu, 0)
            up = next(each for each in product.all_input_nodes if each is not silu)
            silu.args = (up,)
            product.args = tuple(gate if each is up else each for each in product.args)

    return with_graph(program, change)


def without_norm(program: Program, weight: str) -> Program:
    """A program without one norm."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.RMS_NORM):
            if copied.inputs[node_argument(node, 1).name].name == weight:
                node.replace_all_uses_with(node_argument(node, 0))
                copied.graph.erase_node(node)

    return with_graph(program, change)


def _calls(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]
