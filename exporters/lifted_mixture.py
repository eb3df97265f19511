"""A mixture of experts in the vocabulary of `exporters.lifted`.

An expert's own operations are the ordinary ones (`Linear`, `Columns`, `Silu`, `Product`); what
chooses tokens and adds results up is below.
"""

from __future__ import annotations

from dataclasses import dataclass

from exporters.lifted import Value


@dataclass(frozen=True, eq=False)
class Route(Value):
    """Each token's weight of each expert (``edgeforge::route``), zero where it is not chosen.

    A file that states which experts a token chose and their weights apart, as indices and shares,
    is lifted as this too.

    Attributes:
        source: the router's logits, ``float[1, t, E]``.
        chosen: how many experts a token has.
        normalized: whether the kept shares are divided by their sum.
        experts: where the value has the weights of chosen experts alone, in a column each, the
            names of the values that say which experts these are.
    """

    source: Value
    chosen: int
    normalized: bool
    experts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RouteSparseMixer(Value):
    """Each token's weight of each expert by SparseMixer's rule (``edgeforge::route_sparse_mixer``).

    Attributes:
        source: the router's logits, ``float[1, t, E]``.
        jitter: half of the largest relative distance.
        experts: as of `Route`, first and second.
    """

    source: Value
    jitter: float
    experts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ChosenTokens(Value):
    """The tokens that chose an expert (``edgeforge::chosen_tokens``).

    Attributes:
        source: all tokens.
        weights: each token's weight of each expert.
        expert: the column of ``weights`` that is not zero for the tokens.
    """

    source: Value
    weights: Value
    expert: int


@dataclass(frozen=True, eq=False)
class Combine(Value):
    """The sum of what experts computed, times each token's weights (``edgeforge::combine``).

    A file may compute an expert for its `ChosenTokens` only, or for all tokens: then the expert's
    first product reads the operand of the whole mixture, and what it gives for tokens that did not
    choose the expert must not count, whatever it is. Where that is not so, the reader gives an
    `Unknown`. What a file leaves out for a call in which no token chose an expert is lifted as if
    it always ran.

    Attributes:
        weights: each token's weight of each expert.
        terms: the column of ``weights``, and the result that it multiplies, in the file's order.
    """

    weights: Value
    terms: tuple[tuple[int, Value], ...]


@dataclass(frozen=True, eq=False)
class Slots(Value):
    """What each token's experts computed, side by side (``edgeforge::slots``).

    As of `Combine`, a file may compute an expert for all tokens, if what it gives for tokens that
    did not choose the expert does not count. The order in which a file keeps a token's experts is
    its own, as long as `ChosenSlots` reads the same one: attention treats all of them alike.

    Attributes:
        weights: each token's weight of each expert.
        terms: the column of ``weights``, and the result, in the file's order.
        chosen: how many experts a token has.
        heads: how many heads a result has; the columns are ``[heads, chosen, width of a head]``.
    """

    weights: Value
    terms: tuple[tuple[int, Value], ...]
    chosen: int
    heads: int


@dataclass(frozen=True, eq=False)
class ChosenSlots(Value):
    """An expert's own slots of the tokens that chose it (``edgeforge::chosen_slots``).

    A file that computes an expert for all tokens is lifted as this too.

    Attributes:
        source: the slots of all experts, laid out as `Slots`.
        weights: each token's weight of each expert.
        expert: the column of ``weights`` that is not zero for the tokens.
        chosen: how many experts a token has.
        heads: how many heads a slot has.
    """

    source: Value
    weights: Value
    expert: int
    chosen: int
    heads: int
