"""Programs with a fault in a recurrent part."""

from __future__ import annotations

from torch import fx

from quant.program import dialect
from quant.program.program import Program, node_argument
from tests.planted_faults.programs import with_graph


def _calls(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def _weight(program: Program, name: str) -> fx.Node:
    """The placeholder of a weight or a state."""
    return next(
        node
        for node in program.graph.nodes
        if node.op == "placeholder" and program.inputs[node.name].name == name
    )


def _skipped(program: Program, node: fx.Node, operand: int = 0) -> None:
    node.replace_all_uses_with(node_argument(node, operand))
    program.graph.erase_node(node)


def with_arguments_swapped(program: Program, target: object, one: int, other: int) -> Program:
    """A program whose first call of an operator has two operands exchanged."""

    def change(copied: Program) -> None:
        node = _calls(copied, target)[0]
        args = list(node.args)
        args[one], args[other] = args[other], args[one]
        node.args = tuple(args)

    return with_graph(program, change)


def with_weights_swapped(program: Program, one: str, other: str) -> Program:
    """A program in which two weights, or two states, stand in each other's places."""

    def change(copied: Program) -> None:
        first, second = _weight(copied, one), _weight(copied, other)
        users = {node: node.args for node in (*first.users, *second.users)}
        swapped = {first: second, second: first}
        for node, args in users.items():
            node.args = tuple(swapped.get(each, each) for each in args)

    return with_graph(program, change)


def with_state_of_another(program: Program, own: str, other: str) -> Program:
    """A program that uses another layer's state in place of its own."""

    def change(copied: Program) -> None:
        _weight(copied, own).replace_all_uses_with(_weight(copied, other))

    return with_graph(program, change)


def without_call(program: Program, target: object, source: object = None, at: int = 0) -> Program:
    """A program without one call of an operator, of those that read another's result.

    Args:
        program: the program.
        target: the operator.
        source: the operator whose result it must read; None for any.
        at: which of them.
    """

    def change(copied: Program) -> None:
        found = [
            node
            for node in _calls(copied, target)
            if source is None or node_argument(node, 0).target is source
        ]
        _skipped(copied, found[at])

    return with_graph(program, change)


def without_skip(program: Program) -> Program:
    """A program whose first recurrence is not passed by."""

    def change(copied: Program) -> None:
        (total,) = _calls(copied, dialect.RECURRENCE)[0].users
        _skipped(copied, total)

    return with_graph(program, change)


def without_operand(program: Program, operand: int) -> Program:
    """A program whose first recurrence has no bonus (4) or no beta (5)."""

    def change(copied: Program) -> None:
        node = _calls(copied, dialect.RECURRENCE)[0]
        node.args = (*node.args[:operand], None, *node.args[operand + 1 :])

    return with_graph(program, change)


def with_number(program: Program, target: object, place: int, number: float) -> Program:
    """A program whose first call of an operator has another number."""

    def change(copied: Program) -> None:
        node = _calls(copied, target)[0]
        node.args = (*node.args[:place], number, *node.args[place + 1 :])

    return with_graph(program, change)


def with_group_norm(program: Program, epsilon: float) -> Program:
    """A program whose heads' results are normalised with another epsilon."""

    def change(copied: Program) -> None:
        for node in _calls(copied, dialect.LAYER_NORM):
            if node_argument(node, 0).target is dialect.RECURRENCE:
                node.args = (*node.args[:3], epsilon)

    return with_graph(program, change)
