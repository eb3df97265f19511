"""Programs with a fault in a mixture of experts."""

from __future__ import annotations

from torch import fx

from quant.program import dialect
from quant.program.program import Program, node_argument
from tests.planted_faults.programs import with_graph


def with_route(program: Program, *arguments: object) -> Program:
    """A program whose routes have other numbers."""

    def change(copied: Program) -> None:
        for node in copied.graph.nodes:
            if node.target in dialect.ROUTES:
                node.args = (node.args[0], *arguments)

    return with_graph(program, change)


def with_softmax(program: Program) -> Program:
    """A program that chooses by a softmax in place of SparseMixer's rule."""

    def change(copied: Program) -> None:
        for node in copied.graph.nodes:
            if node.target is dialect.ROUTE_SPARSE_MIXER:
                node.target, node.args = dialect.ROUTE, (node.args[0], 2, True)

    return with_graph(program, change)


def with_results_swapped(program: Program) -> Program:
    """A program whose first two experts' results are multiplied by each other's weights."""

    def change(copied: Program) -> None:
        node = _first(copied, dialect.COMBINE)
        one, other, *rest = node.args[1]
        node.args = (node.args[0], [other, one, *rest])

    return with_graph(program, change)


def with_matrices_swapped(program: Program, part: str) -> Program:
    """A program of which two experts of the first mixture have each other's matrices.

    Args:
        program: the sound one.
        part: ``gate_up_proj`` or ``down_proj``.
    """

    def change(copied: Program) -> None:
        one, other = (
            next(
                node
                for node in copied.graph.nodes
                if node.target is dialect.LINEAR
                and _weight(copied, node).endswith(f".experts.{expert}.{part}.weight")
            )
            for expert in (1, 2)
        )
        weights = node_argument(one, 1), node_argument(other, 1)
        one.args, other.args = (one.args[0], weights[1]), (other.args[0], weights[0])

    return with_graph(program, change)


def with_tokens_of_another(program: Program) -> Program:
    """A program whose first expert gets the tokens that chose the second."""

    def change(copied: Program) -> None:
        node = _first(copied, dialect.CHOSEN)
        node.args = (*node.args[:2], 1)

    return with_graph(program, change)


def without_last_expert(program: Program) -> Program:
    """A program whose first mixture leaves its last expert's result out."""

    def change(copied: Program) -> None:
        node = _first(copied, dialect.COMBINE)
        node.args = (node.args[0], list(node.args[1])[:-1])

    return with_graph(program, change)


def without_shared_gate(program: Program) -> Program:
    """A program whose shared expert's result is added as it is."""

    def change(copied: Program) -> None:
        gate = _first(copied, dialect.SIGMOID)
        (product,) = gate.users
        result = next(each for each in product.all_input_nodes if each is not gate)
        product.replace_all_uses_with(result)

    return with_graph(program, change)


def without_shared_expert(program: Program) -> Program:
    """A program that leaves the shared expert out."""

    def change(copied: Program) -> None:
        (product,) = _first(copied, dialect.SIGMOID).users
        (total,) = product.users
        rest = next(each for each in total.all_input_nodes if each is not product)
        total.replace_all_uses_with(rest)

    return with_graph(program, change)


def with_router_before_norm(program: Program) -> Program:
    """A program whose first router reads the residual stream without its norm."""

    def change(copied: Program) -> None:
        router = next(
            node
            for node in copied.graph.nodes
            if node.target is dialect.LINEAR and "router" in _weight(copied, node)
        )
        router.args = (node_argument(node_argument(router, 0), 0), router.args[1])

    return with_graph(program, change)


def _first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def _weight(program: Program, node: fx.Node) -> str:
    return program.inputs[node_argument(node, 1).name].name
