"""Recognises a mixture of attention heads in what an entry point computes.

Queries and outputs are experts', keys, values and attention itself are one for all
(`edgeforge.model.attention_mixture`).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeforge.verification.meaning.attending import attention_of, same_steps
from edgeforge.verification.meaning.chains import (
    Chain,
    NoDecoderError,
    chain,
    described,
    other,
    plain,
)
from edgeforge.verification.meaning.router import Router, router_of
from exporters.lifted import Attention, Linear, Value
from exporters.lifted_mixture import ChosenSlots, ChosenTokens, Combine, Slots


@dataclass(frozen=True)
class QueryExpert:
    """An expert's queries.

    Attributes:
        column: the column of the weights by which its slots are filled.
        chosen: the column of the weights by which its tokens are chosen; None where it works on all
            tokens.
        by: the weights by which its tokens are chosen; None where it works on all.
        entering: how the operand of ``product`` is made for all tokens, of the residual stream.
        product: the product that gives the queries.
        result: the steps after it.
    """

    column: int
    chosen: int | None
    by: Value | None
    entering: Chain
    product: Linear
    result: Chain


@dataclass(frozen=True)
class OutputExpert:
    """What an expert makes of its own part of attention's result.

    Attributes:
        column: the column of the weights that multiplies its results.
        own: the slots that it reads.
        entering: the steps between these and ``product``.
        product: the product that gives its results.
        result: the steps after it.
    """

    column: int
    own: ChosenSlots
    entering: Chain
    product: Linear
    result: Chain


@dataclass(frozen=True)
class HeadMixture:
    """The part of a layer that mixes tokens by attention whose query heads are experts.

    Attributes:
        attention: the attention.
        slots: what places the experts' queries side by side.
        combine: what adds their outputs up.
        query: the steps between ``slots`` and attention.
        key: how keys are made, of ``k``.
        value: how values are made, of ``v``.
        router: how tokens choose experts.
        queries: the experts' queries, in the file's order.
        outputs: the experts' outputs, in the file's order.
        k: the product that gives keys.
        v: the product that gives values.
    """

    attention: Attention
    slots: Slots
    combine: Combine
    query: Chain
    key: Chain
    value: Chain
    router: Router
    queries: tuple[QueryExpert, ...]
    outputs: tuple[OutputExpert, ...]
    k: Linear
    v: Linear

    @property
    def entering(self) -> Chain:
        """How the operand of the router, of keys and of values is made."""
        return self.router.entering

    def products(self) -> tuple[Linear, ...]:
        """Its products with weights."""
        queries = (expert.product for expert in self.queries)
        outputs = (expert.product for expert in self.outputs)
        return self.router.product, *queries, self.k, self.v, *outputs

    def chains(self) -> tuple[Chain, ...]:
        """Its chains of steps."""
        experts: list[QueryExpert | OutputExpert] = [*self.queries, *self.outputs]
        inner = [each for expert in experts for each in (expert.entering, expert.result)]
        return self.query, self.key, self.value, self.entering, self.router.logits, *inner


def head_mixture(combine: Combine, before: Value) -> HeadMixture:
    """Recognises a mixture of attention heads.

    Args:
        combine: the sum of the experts' outputs.
        before: the residual stream before the layer.

    Raises:
        NoDecoderError: names the first value that is another.
    """
    outputs = tuple(_output(*term) for term in combine.terms)
    attention = attention_of(outputs[0].own.source)
    for expert in outputs:
        if plain(expert.own.source) is not attention:
            raise other(expert.own.source, f"the result of {described(attention)}")
    query, key, value = (chain(each) for each in (attention.query, attention.key, attention.value))
    slots = query.the(Slots, "the queries of experts")
    router = router_of(slots.weights, before)
    queries = tuple(_query(*term, before) for term in slots.terms)
    k, v = key.the(Linear, "the keys"), value.the(Linear, "the values")
    for what, product in (("keys", k), ("values", v)):
        entering = chain(product.source, before)
        own = entering.source is router.entering.source
        if not (own and same_steps(entering, router.entering)):
            raise NoDecoderError(
                f"{described(attention)} reads {what} that are made of {described(product)}, which "
                f"reads other values than the router of its queries",
                "caches",
            )
    return HeadMixture(attention, slots, combine, query, key, value, router, queries, outputs, k, v)


def _query(column: int, result: Value, before: Value) -> QueryExpert:
    made = chain(result)
    product = made.the(Linear, f"the queries of expert {column}")
    entering = chain(product.source, before)
    chosen = entering.source
    if entering.steps or not isinstance(chosen, ChosenTokens):
        return QueryExpert(column, None, None, entering, product, made)
    entering = chain(chosen.source, before)
    return QueryExpert(column, chosen.expert, plain(chosen.weights), entering, product, made)


def _output(column: int, result: Value) -> OutputExpert:
    made = chain(result)
    product = made.the(Linear, f"the output of expert {column}")
    entering = chain(product.source)
    own = entering.the(ChosenSlots, f"the slots of expert {column}")
    return OutputExpert(column, own, entering, product, made)
