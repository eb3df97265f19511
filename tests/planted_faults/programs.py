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


def with_window(program: Program, window: int, *, layer: int | None = None) -> Program:
    """A program whose attentions, or that of one layer, have another window."""
    return with_attention(program, window=window, layer=layer)


def with_attention(
    program: Program,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    layer: int | None = None,
) -> Program:
    """A program whose attentions, or that of one layer, have other numbers."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.ATTENTION):
            if layer is None or _layer(copied, node) == layer:
                own = node.args[6:9]
                new = [
                    old if number is None else number
                    for old, number in zip(own, (window, scale, softcap), strict=True)
                ]
                node.args = (*node.args[:6], *new)

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
    return without(program, dialect.RMS_NORM, weight)


def without(program: Program, target: object, weight: str = "") -> Program:
    """A program without the calls of an operator, or without those that read a weight."""

    def change(copied: Program) -> None:
        for node in _calls(copied, target):
            if not weight or copied.inputs[node_argument(node, 1).name].name == weight:
                _drop(copied, node)

    return with_graph(program, change)


def without_shift(program: Program, weight: str) -> Program:
    """A program of which one LayerNorm does not add its shift."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.LAYER_NORM):
            if copied.inputs[node_argument(node, 2).name].name == weight:
                node.args = (*node.args[:2], None, node.args[3])

    return with_graph(program, change)


def with_factor(program: Program, factor: float, other: float) -> Program:
    """A program with another number where one factor is."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.SCALE):
            if node.args[1] == factor:
                node.args = (node.args[0], other)

    return with_graph(program, change)


def without_factor(program: Program, factor: float) -> Program:
    """A program without one factor."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.SCALE):
            if node.args[1] == factor:
                _drop(copied, node)

    return with_graph(program, change)


def with_rotation(program: Program, layer: int) -> Program:
    """A program that rotates queries and keys of a layer that must not rotate them."""

    def change(copied: Program) -> None:
        tables = _calls(copied, dialect.ROPE)[0].args[1:]
        for node in _calls(copied, dialect.ATTENTION):
            if _layer(copied, node) != layer:
                continue
            for index in (0, 1):
                given = node_argument(node, index)
                with copied.graph.inserting_before(node):
                    turned = copied.graph.call_function(dialect.ROPE, (given, *tables))
                turned.meta["val"] = given.meta["val"]
                node.replace_input_with(given, turned)

    return with_graph(program, change)


def without_rotation(program: Program, layer: int) -> Program:
    """A program that does not rotate queries and keys of a layer."""

    def change(copied: Program) -> None:
        for node in _rotations(copied, layer):
            _drop(copied, node)

    return with_graph(program, change)


def with_tables_of(program: Program, layer: int, other: str) -> Program:
    """A program whose layer is rotated by another rotary embedding's tables.

    Args:
        program: the sound one.
        layer: the layer.
        other: what the names of the other tables end with.
    """

    def change(copied: Program) -> None:
        by_name = {given.name: node for node, given in copied.placeholders("table")}
        for node in _rotations(copied, layer):
            tables = (by_name[f"rope_cos{other}"], by_name[f"rope_sin{other}"])
            node.args = (node.args[0], *tables, node.args[3])

    return with_graph(program, change)


def with_shared_state(program: Program, layer: int, other: int) -> Program:
    """A program of which a layer's convolution uses the state of another's."""

    def change(copied: Program) -> None:
        by_layer = {_layer(copied, node): node for node in _calls(copied, dialect.SHORT_CONV)}
        state = node_argument(by_layer[layer], 2)
        node = by_layer[other]
        node.args = (*node.args[:2], state, node.args[3])

    return with_graph(program, change)


def _rotations(program: Program, layer: int) -> list[fx.Node]:
    return [
        each
        for node in _calls(program, dialect.ATTENTION)
        if _layer(program, node) == layer
        for each in node.all_input_nodes
        if each.target is dialect.ROPE
    ]


def _layer(program: Program, node: fx.Node) -> int:
    """The layer of a call that has a state."""
    index = 3 if node.target is dialect.ATTENTION else 2
    return int(program.inputs[node_argument(node, index).name].name.split(".")[2])


def _drop(program: Program, node: fx.Node) -> None:
    node.replace_all_uses_with(node_argument(node, 0))
    program.graph.erase_node(node)


def _calls(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]
