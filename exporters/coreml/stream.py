"""Which results must stay float32: wide streams, routers' logits, what is around recurrences."""

from __future__ import annotations

from typing import Final

from torch import fx

from quant.program import dialect
from quant.program.program import Program, node_argument

_ROWS: Final = (dialect.EMBEDDING, dialect.QUANT_EMBEDDING)
_NORMS: Final = (dialect.RMS_NORM, dialect.LAYER_NORM)
# What passes a stream, or what is added to one, on.
_PASSING: Final = (dialect.SCALE, dialect.LAST)
# What leads to a recurrence: from the products that give decays and rates, and from there on.
_BEFORE: Final = dialect.ELEMENTWISE | {dialect.VIEW, dialect.MUL, dialect.L2_NORM}
# What follows it, up to the norm of its result.
_BEHIND: Final = frozenset({dialect.VIEW, dialect.ADD, dialect.MUL, dialect.GAIN})
_PRODUCTS: Final = frozenset({dialect.LINEAR, dialect.QUANT_LINEAR})
# Of these functions what goes in is float16: their results are activations like any other.
_OPENING: Final = frozenset({dialect.SILU, dialect.GELU})


def wide_stream(program: Program) -> frozenset[fx.Node]:
    """Finds the residual stream of a model whose stream should be float32 where that is possible.

    A stream may exceed float16's range (`may_exceed_half`). In a mixture of experts, what float16
    rounds in the stream moves a router's logits, and sends tokens to other experts where two are
    nearly equal.

    Returns:
        The embedding's rows, the sums, and the norms, factors and mixtures' biases whose results
        are added; nothing for any other model.
    """
    stream, added = _stream(program)
    if has_mixtures(program) or may_exceed_half(program):
        return frozenset(stream | added)
    return frozenset()


def has_mixtures(program: Program) -> bool:
    """Whether tokens choose experts."""
    return any(node.target in dialect.ROUTES for node in program.graph.nodes)


def has_recurrences(program: Program) -> bool:
    """Whether layers have a memory."""
    return any(node.target is dialect.RECURRENCE for node in program.graph.nodes)


def may_exceed_half(program: Program) -> bool:
    """Whether the residual stream may exceed float16's range.

    Models that multiply their embeddings, or add norms' results to the stream, were trained in
    bfloat16, whose range is float32's; Gemma's streams reach hundreds of thousands. In other
    models each addition is a product with a weight, and float16 has held them.
    """
    stream, added = _stream(program)
    multiplied = any(
        user.target is dialect.SCALE
        for node in stream
        if node.target in _ROWS
        for user in node.users
    )
    return multiplied or any(node.target in _NORMS for node in added)


def _stream(program: Program) -> tuple[set[fx.Node], set[fx.Node]]:
    """The embedding's rows with all sums that begin there, and what else `_added` finds."""
    stream: set[fx.Node] = set()
    added: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.target in _ROWS or (node.target in _PASSING and node_argument(node, 0) in stream):
            stream.add(node)
        elif node.target is dialect.ADD:
            terms = [node_argument(node, index) for index in (0, 1)]
            if any(term in stream for term in terms):
                stream.add(node)
                added.update(part for term in terms if term not in stream for part in _added(term))
    return stream, added


def router_logits(program: Program) -> frozenset[fx.Node]:
    """Finds the products by which tokens choose experts.

    Logits that float16 rounds would send a token to another expert wherever two are nearly equal.
    """
    return frozenset(
        node
        for node in program.graph.nodes
        if node.target in (dialect.LINEAR, dialect.QUANT_LINEAR)
        and any(user.target in dialect.ROUTES for user in node.users)
    )


def around_recurrences(program: Program, *, products: bool) -> frozenset[fx.Node]:
    """Finds what is float32 because a recurrence, which is float32 itself, reads or gives it.

    An error of a decay's logarithm is an error of how long a recurrence remembers, and what it
    gives may be beyond float16 until a norm divides it.

    Args:
        program: the program.
        products: whether the products by which tokens give decays and rates belong to it.

    Returns:
        The recurrences; the factors, functions and norms between products and their operands; what
        is between their results and the next norm.
    """
    recurrences = [node for node in program.graph.nodes if node.target is dialect.RECURRENCE]
    found = set(recurrences)
    for node in recurrences:
        left = [(node_argument(node, index), index in (3, 5)) for index in (0, 1, 2, 3, 5)
                if isinstance(node.args[index], fx.Node)]  # fmt: skip
        while left:
            source, decides = left.pop()
            if source.target in _PRODUCTS and decides and products:
                found.add(source)
            if source.target not in _BEFORE - _OPENING or source in found:
                continue
            found.add(source)
            inner = source.args[:2] if source.target is dialect.MUL else source.args[:1]
            left += [(each, decides) for each in inner if isinstance(each, fx.Node)]
    for node in program.graph.nodes:
        if node.target in _BEHIND and any(
            source in found and source.target in _BEHIND | {dialect.RECURRENCE}
            for source in node.all_input_nodes
        ):
            found.add(node)
    return frozenset(found)


def _added(term: fx.Node) -> list[fx.Node]:
    """A norm, a mixture's bias, or a factor on one or on a product, that is added to the stream."""
    found = []
    while term.target in _PASSING:
        found.append(term)
        term = node_argument(term, 0)
    return [*found, term] if term.target in _NORMS or _is_mixtures(term) else found


def _is_mixtures(bias: fx.Node) -> bool:
    """Whether a node adds a bias to the sum of experts' results, which is float32."""
    return bias.target is dialect.BIAS and node_argument(bias, 0).target is dialect.COMBINE
