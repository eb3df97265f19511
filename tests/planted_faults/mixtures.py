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


def with_results_swapped(program: Program, gathered: object = dialect.COMBINE) -> Program:
    """A program in which two experts' results take each other's places.

    Args:
        program: the sound one.
        gathered: what reads the results; those of its first call are swapped.
    """

    def change(copied: Program) -> None:
        node = _first(copied, gathered)
        one, other, *rest = node.args[1]
        node.args = (node.args[0], [other, one, *rest], *node.args[2:])

    return with_graph(program, change)


def with_matrices_swapped(program: Program, part: str) -> Program:
    """A program of which two experts of the first mixture have each other's matrices.

    Args:
        program: the sound one.
        part: ``gate_up_proj`` or ``down_proj``; of a mixture of heads ``q_proj`` or ``o_proj``.
    """

    def change(copied: Program) -> None:
        one, other = (
            next(
                node
                for node in copied.graph.nodes
                if node.target in (dialect.LINEAR, dialect.QUANT_LINEAR)
                and _weight(copied, node).endswith(f".experts.{expert}.{part}.weight")
            )
            for expert in (1, 2)
        )
        weights = one.args[1:], other.args[1:]
        one.args, other.args = (one.args[0], *weights[1]), (other.args[0], *weights[0])

    return with_graph(program, change)


def with_tokens_of_another(program: Program) -> Program:
    """A program whose first expert gets the tokens that chose the second."""

    def change(copied: Program) -> None:
        node = _first(copied, dialect.CHOSEN)
        node.args = (*node.args[:2], 1)

    return with_graph(program, change)


def without_last_expert(program: Program, gathered: object = dialect.COMBINE) -> Program:
    """A program whose first mixture leaves its last expert's result out.

    Args:
        program: the sound one.
        gathered: what reads the results.
    """

    def change(copied: Program) -> None:
        node = _first(copied, gathered)
        node.args = (node.args[0], list(node.args[1])[:-1], *node.args[2:])

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


def with_slots(program: Program, target: object, chosen: int, heads: int) -> Program:
    """A program whose slots are laid out otherwise.

    Args:
        program: the sound one.
        target: where: ``slots`` or ``chosen_slots``.
        chosen: how many experts a token has there.
        heads: how many heads each has there.
    """

    def change(copied: Program) -> None:
        for node in copied.graph.nodes:
            if node.target is target:
                node.args = (*node.args[:-2], chosen, heads)

    return with_graph(program, change)


def with_slots_of_another(program: Program) -> Program:
    """A program whose second expert makes its output of the slots of the third."""

    def change(copied: Program) -> None:
        node = [each for each in copied.graph.nodes if each.target is dialect.CHOSEN_SLOTS][1]
        node.args = (*node.args[:2], 2, *node.args[3:])

    return with_graph(program, change)


def with_weights_of_first_router(program: Program, target: object) -> Program:
    """A program whose last calls of an operator read the first router's weights.

    Args:
        program: the sound one, of several routers.
        target: ``combine``, ``chosen_slots`` or ``chosen_tokens``; calls that belong to the last
            router are changed.
    """

    def change(copied: Program) -> None:
        routes = [node for node in copied.graph.nodes if node.target in dialect.ROUTES]
        for node in copied.graph.nodes:
            if node.target is target and routes[-1] in node.all_input_nodes:
                node.replace_input_with(routes[-1], routes[0])

    return with_graph(program, change)


def with_matrix_of(program: Program, weight: str, other: str) -> Program:
    """A program in which a product reads another one's matrix."""

    def change(copied: Program) -> None:
        parts = {(g.name, g.part): node for node, g in copied.placeholders("weight")}
        for (name, part), own in parts.items():
            for node in list(own.users) if name == weight else ():
                node.replace_input_with(own, parts[other, part])

    return with_graph(program, change)


def _first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def _weight(program: Program, node: fx.Node) -> str:
    return program.inputs[node_argument(node, 1).name].name
