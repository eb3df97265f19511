"""Where a rotation folds into a program's weights and costs nothing when it runs.

Two places of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) are read off the graph, so
that a family needs to name none:

- the residual stream: what the embedding gives, sums with what linears add, norms that read it;
- attention's values, head by head, between the linear that makes them and the one that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from quant.errors import QuantizationError
from quant.program.dialect import ADD, ATTENTION, EMBEDDING, LINEAR, RMS_NORM, VIEW
from quant.program.program import Program, node_argument
from quant.program.rescale_places import split_linear


@dataclass(frozen=True)
class ResidualPlaces:
    """The weights on both sides of the residual stream, for a rotation ``Q`` of it.

    Attributes:
        embedding: becomes ``E Q``.
        readers: linears, each with the norm of the stream that it reads, whose scale ``g`` moves
            into it: ``W diag(g) Q``.
        writers: linears that add to the stream: ``Q^T W``. A reader may be one as well: it gives
            what the embedding reads as a head.
    """

    embedding: str
    readers: Mapping[str, str]
    writers: frozenset[str]


@dataclass(frozen=True)
class ValuePlace:
    """The weights on both sides of one layer's values.

    Attributes:
        maker: the linear that makes the values, among others.
        first_row: of them in it.
        reader: the linear that reads what attention makes of them.
        kv_heads: heads of values.
        heads: heads of queries.
        width: of a head.
    """

    maker: str
    first_row: int
    reader: str
    kv_heads: int
    heads: int
    width: int


def residual_places(program: Program) -> ResidualPlaces:
    """Follows the residual stream through a program in the float dialect.

    Raises:
        QuantizationError: something else than a linear's sum and an RMS norm touches it, or a
            weight is read in two places: a rotation would change what the model computes.
    """
    stream: set[fx.Node] = set()
    embedding = ""
    readers: dict[str, str] = {}
    writers: set[str] = set()
    for node in program.graph.nodes:
        if node.target is EMBEDDING:
            if embedding:
                raise _refusal(f"{node.name} is a second embedding")
            embedding = _weight(program, node)
            stream.add(node)
            continue
        read = [source for source in node.all_input_nodes if source in stream]
        if not read or node.op == "output":
            if read:
                raise _refusal("the residual stream leaves the model without a norm")
            continue
        if node.target is ADD:
            writers.update(_writers(program, node, stream))
            stream.add(node)
        elif node.target is RMS_NORM:
            norm = _weight(program, node, alone=True)
            for user in node.users:
                if user.target is not LINEAR:
                    raise _refusal(f"{user.name} ({user.target}) reads {norm} and is no linear")
                readers[_weight(program, user, alone=True, head=embedding)] = norm
                if _is_head(program, user, embedding):
                    writers.add(_weight(program, user))
        else:
            raise _refusal(f"{node.name} ({node.target}) reads the residual stream")
    if not embedding:
        raise _refusal("the program has no embedding")
    if embedding in readers:
        raise _refusal(f"{embedding} is the head too, behind a norm whose scale cannot move there")
    return ResidualPlaces(embedding, readers, frozenset(writers))


def value_places(program: Program) -> tuple[ValuePlace, ...]:
    """The values of every attention of a program in the float dialect.

    Raises:
        QuantizationError: they go through something else than attention between two linears.
    """
    places = []
    for node in program.graph.nodes:
        if node.target is not ATTENTION:
            continue
        query, value = node_argument(node, 0), node_argument(node, 2)
        (reader, *others) = node.users
        fold = None
        if value.target is VIEW and len(value.users) == 1:
            fold = split_linear(program, node_argument(value, 0), None)
        if fold is None or others or reader.target is not LINEAR:
            raise _refusal(f"the values of {node.name} do not lie between two linears alone")
        _, _, kv_heads, width = value.meta["val"].shape
        places.append(
            ValuePlace(
                fold.weight,
                int(fold.rows[0]),
                _weight(program, reader, alone=True),
                int(kv_heads),
                int(query.meta["val"].shape[2]),
                int(width),
            )
        )
    return tuple(places)


def _writers(program: Program, add: fx.Node, stream: set[fx.Node]) -> list[str]:
    """The linears of a sum's terms that are not the stream itself."""
    names = []
    for index in (0, 1):
        term = node_argument(add, index)
        if term in stream:
            continue
        if term.target is not LINEAR or len(term.users) != 1:
            raise _refusal(
                f"{add.name} adds {term.name}, which is no linear's alone, to the stream"
            )
        names.append(_weight(program, term, alone=True))
    return names


def _is_head(program: Program, linear: fx.Node, embedding: str) -> bool:
    """Whether the embedding, as the head, reads what a linear gives, and nothing else does."""
    users = list(linear.users)
    return (
        len(users) == 1
        and users[0].target is LINEAR
        and node_argument(users[0], 0) is linear
        and _weight(program, users[0]) == embedding
    )


def _weight(program: Program, node: fx.Node, *, alone: bool = False, head: str = "") -> str:
    """The weight that a call reads; ``alone``: no other call may read it, but for the ``head``."""
    source = node_argument(node, 1)
    name = program.inputs[source.name].name
    if alone and len(source.users) != 1 and name != head:
        raise _refusal(f"{name} is read in {len(source.users)} places")
    return name


def _refusal(found: str) -> QuantizationError:
    return QuantizationError(
        f"the model cannot be rotated: {found}; a rotation folds where RMS norms and sums with "
        f"linears alone touch the residual stream: leave --rotation out"
    )
