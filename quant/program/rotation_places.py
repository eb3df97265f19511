"""Finds where a rotation folds into a program's weights, at no cost at run time.

The code finds two places of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) in the
graph, so a family need not name them:

- the residual stream: the embedding's output, the sums to which linears add, the norms that read
  it. Factors on either commute with a rotation, and biases are rotated like the linears' rows;
- attention's values, head by head, between the linear that produces them and the linear that reads
  attention's output, or the linears of the experts that read their own heads of it.

LayerNorm and norms on what is added to the stream do not commute with a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from quant.errors import QuantizationError
from quant.program.dialect import (
    ADD,
    ATTENTION,
    BIAS,
    CHOSEN,
    CHOSEN_SLOTS,
    CLAMP,
    COMBINE,
    EMBEDDING,
    LAYER_NORM,
    LINEAR,
    MUL,
    RMS_NORM,
    SCALE,
    SIGMOID,
    VIEW,
)
from quant.program.program import Program, node_argument
from quant.program.rescale_places import linear_before


@dataclass(frozen=True)
class ResidualPlaces:
    """The weights on both sides of the residual stream, for a rotation ``Q`` of the stream.

    Attributes:
        embedding: the name of the embedding ``E``, which becomes ``E Q``.
        readers: by the name of each linear that reads the stream, the name of the norm before it.
            The norm's scale ``g`` moves into the linear: ``W`` becomes ``W diag(g) Q``.
        writers: names of the linears that add to the stream: ``W`` becomes ``Q^T W``. A reader is
            a writer as well where the embedding, as the tied head, reads its output.
        biases: names of the biases that are added to it: ``b`` becomes ``Q^T b``.
    """

    embedding: str
    readers: Mapping[str, str]
    writers: frozenset[str]
    biases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ValuePlace:
    """The weights on both sides of one layer's attention values.

    Attributes:
        maker: the name of the linear that produces the values, among other outputs.
        first_row: the linear's first row that produces values.
        readers: names of the linears that read attention's output: one, or one of each expert.
        kv_heads: number of value heads.
        heads: number of query heads whose output a reader reads.
        width: the width of a head.
        bias: the name of the maker's bias; None where it has none.
    """

    maker: str
    first_row: int
    readers: tuple[str, ...]
    kv_heads: int
    heads: int
    width: int
    bias: str | None = None


def residual_places(program: Program) -> ResidualPlaces:
    """Follows the residual stream through a program in the float dialect.

    Raises:
        QuantizationError: something other than RMS norms and sums with linears' outputs reads the
            stream, or two places read one weight: a rotation would change the model's outputs.
    """
    stream: set[fx.Node] = set()
    embedding = ""
    readers: dict[str, str] = {}
    writers: set[str] = set()
    biases: set[str] = set()
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
            _add_writers(program, node, stream, writers, biases)
            stream.add(node)
        elif node.target is SCALE:
            stream.add(node)
        elif node.target is RMS_NORM:
            norm = _weight(program, node, alone=True)
            for user in _linears_after(node, norm):
                readers[_weight(program, user, alone=True, head=embedding)] = norm
                if _is_head(program, user, embedding):
                    writers.add(_weight(program, user))
        else:
            if node.target is LINEAR:
                raise _refusal(f"{_weight(program, node)} reads the residual stream without a norm")
            mean = ", and subtracts its mean" if node.target is LAYER_NORM else ""
            raise _refusal(f"{node.name} ({node.target}) reads the residual stream{mean}")
    if not embedding:
        raise _refusal("the program has no embedding")
    if embedding in readers:
        raise _refusal(
            f"{embedding} is also the head, into which the scale of the norm before cannot move"
        )
    return ResidualPlaces(embedding, readers, frozenset(writers), frozenset(biases))


def value_places(program: Program) -> tuple[ValuePlace, ...]:
    """Finds the values of every attention call of a program in the float dialect.

    Attention whose result is multiplied by a gate has none: the gate belongs to single columns.

    Raises:
        QuantizationError: something other than attention lies between the linear that produces
            the values and the linear that reads attention's output.
    """
    places = []
    for node in program.graph.nodes:
        if node.target is not ATTENTION:
            continue
        value = node_argument(node, 2)
        users = list(node.users)
        if [user.target for user in users] == [MUL]:
            continue
        fold = None
        if value.target is VIEW and len(value.users) == 1:
            fold = linear_before(program, node_argument(value, 0), None, "")
        readers = _output_readers(node)
        if fold is None or not readers:
            bound = ""
            if value.target is VIEW and node_argument(value, 0).target is CLAMP:
                bound = ", for they are bounded"
            raise _refusal(
                f"the values of {node.name} do not lie directly between one linear and another"
                f"{bound}"
            )
        _, _, kv_heads, width = value.meta["val"].shape
        # An expert reads its own heads alone.
        columns = node_argument(readers[0], 0).meta["val"].shape[-1]
        places.append(
            ValuePlace(
                fold.weight,
                int(fold.rows[0]),
                tuple(_weight(program, reader, alone=True) for reader in readers),
                int(kv_heads),
                int(columns // width),
                int(width),
                fold.added,
            )
        )
    return tuple(places)


def _output_readers(attention: fx.Node) -> list[fx.Node]:
    """The linear that reads attention's output, or those of experts; none if others read it."""
    users = list(attention.users)
    if all(user.target is CHOSEN_SLOTS for user in users):
        users = [linear for user in users for linear in user.users]
    elif len(users) != 1:
        return []
    return users if all(user.target is LINEAR for user in users) else []


def _add_writers(
    program: Program, add: fx.Node, stream: set[fx.Node], writers: set[str], biases: set[str]
) -> None:
    """Adds the names of the linears, and of their biases, that a sum adds to the stream.

    Raises:
        QuantizationError: it adds something else, or a linear's output that others read too.
    """
    for index in (0, 1):
        term = node_argument(add, index)
        if term in stream:
            continue
        for each in _summands(program, term, biases):
            _add_writer(program, add, each, writers, biases)


def _add_writer(
    program: Program, add: fx.Node, term: fx.Node, writers: set[str], biases: set[str]
) -> None:
    linear = term
    while linear.target in (SCALE, BIAS) and len(linear.users) == 1:
        if linear.target is BIAS:
            biases.add(_weight(program, linear, alone=True))
        linear = node_argument(linear, 0)
    if linear.target is RMS_NORM:
        norm = _weight(program, linear)
        raise _refusal(f"{norm} scales what is added to the residual stream")
    if linear.target is not LINEAR or len(linear.users) != 1:
        raise _refusal(
            f"{add.name} adds {term.name} to the stream, but may add only a linear's output "
            f"that nothing else reads"
        )
    writers.add(_weight(program, linear, alone=True))


def _summands(program: Program, term: fx.Node, biases: set[str]) -> list[fx.Node]:
    """What a mixture of experts adds to the stream: the result of each expert and the shared one.

    Every expert's result is multiplied by one number for each token, which commutes with a
    rotation. Of a shared expert that number is a sigmoid's. Any other term is itself. The name of
    a bias that is added to the experts' sum joins ``biases``.
    """
    if len(term.users) != 1:
        return [term]
    if term.target is SCALE and node_argument(term, 0).target in (COMBINE, ADD, MUL, BIAS):
        return _summands(program, node_argument(term, 0), biases)
    if term.target is BIAS and node_argument(term, 0).target is COMBINE:
        biases.add(_weight(program, term, alone=True))
        return _summands(program, node_argument(term, 0), biases)
    if term.target is COMBINE:
        results = term.args[1]
        assert isinstance(results, list | tuple)
        return [each for each in results if isinstance(each, fx.Node)]
    if term.target is ADD:
        terms = [node_argument(term, index) for index in (0, 1)]
        return [each for one in terms for each in _summands(program, one, biases)]
    if term.target is MUL:
        factors = [node_argument(term, index) for index in (0, 1)]
        rest = [each for each in factors if each.target is not SIGMOID]
        if len(rest) == 1 and all(
            int(f.meta["val"].shape[-1]) == 1 for f in factors if f not in rest
        ):
            return rest
    return [term]


def _linears_after(norm: fx.Node, name: str) -> list[fx.Node]:
    """The linears that read a norm, also those of experts for the tokens that chose them.

    Raises:
        QuantizationError: something else reads it.
    """
    found = []
    for user in norm.users:
        chosen = user.target is CHOSEN and node_argument(user, 0) is norm
        for linear in user.users if chosen else [user]:
            if linear.target is not LINEAR:
                raise _refusal(f"{linear.name} ({linear.target}) reads {name} and is not a linear")
            found.append(linear)
    return found


def _is_head(program: Program, linear: fx.Node, embedding: str) -> bool:
    """Whether only the embedding, as the tied head, reads a linear's output."""
    users = list(linear.users)
    return (
        len(users) == 1
        and users[0].target is LINEAR
        and node_argument(users[0], 0) is linear
        and _weight(program, users[0]) == embedding
    )


def _weight(program: Program, node: fx.Node, *, alone: bool = False, head: str = "") -> str:
    """Returns the name of the weight that a call reads.

    Raises:
        QuantizationError: ``alone`` is set, other calls read the weight too, and it is not
            ``head``.
    """
    source = node_argument(node, 1)
    name = program.inputs[source.name].name
    if alone and len(source.users) != 1 and name != head:
        raise _refusal(f"{name} is read in {len(source.users)} places")
    return name


def _refusal(found: str) -> QuantizationError:
    return QuantizationError(
        f"the model cannot be rotated: {found}; a rotation folds only where RMS norms and sums "
        f"with linears' outputs are all that touches the residual stream: leave --rotation out"
    )
