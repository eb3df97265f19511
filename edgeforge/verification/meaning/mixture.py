"""Recognises a mixture of experts in what an entry point computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgeforge.verification.meaning.chains import Chain, chain, expect, other, plain
from edgeforge.verification.meaning.feed_forward import FeedForward, feed_forward_of
from edgeforge.verification.meaning.router import Router, router_of
from exporters.lifted import Linear, Product, Sigmoid, Sum, Value
from exporters.lifted_mixture import ChosenTokens, Combine


@dataclass(frozen=True)
class Expert:
    """An expert of a mixture.

    Attributes:
        column: the column of the weights that multiplies its results.
        chosen: the column of the weights by which its tokens are chosen; None where it works on all
            tokens.
        by: the weights by which its tokens are chosen.
        part: what it computes; ``part.entering`` is of all tokens.
        result: the steps after its last product.
    """

    column: int
    chosen: int | None
    by: Value
    part: FeedForward
    result: Chain


@dataclass(frozen=True)
class Mixture:
    """The part of a layer that works token by token, as a mixture of experts.

    Attributes:
        router: how tokens choose experts; its weights are those that results are multiplied by.
        experts: the experts, in the file's order.
        shared: what every token has beside the experts that it chose; None for nothing.
        shared_result: the steps after its last product.
        shared_gate: the product whose sigmoid multiplies it; None where nothing does.
        shared_entering: how the operand of that product is made; None where there is none.
    """

    router: Router
    experts: tuple[Expert, ...]
    shared: FeedForward | None = None
    shared_result: Chain | None = None
    shared_gate: Linear | None = None
    shared_entering: Chain | None = None

    @property
    def entering(self) -> Chain:
        """How the operand of the router is made, of the residual stream."""
        return self.router.entering

    def parts(self) -> Iterator[FeedForward]:
        """The experts' parts and the shared one."""
        for expert in self.experts:
            yield expert.part
        if self.shared is not None:
            yield self.shared

    def products(self) -> tuple[Linear, ...]:
        """Its products with weights."""
        gate = () if self.shared_gate is None else (self.shared_gate,)
        inner = [product for part in self.parts() for product in part.products()]
        return self.router.product, *inner, *gate

    def chains(self) -> tuple[Chain, ...]:
        """Its chains of steps."""
        inner = [each for part in self.parts() for each in part.chains()]
        results = [expert.result for expert in self.experts]
        others = (self.shared_result, self.shared_entering)
        ends = (each for each in others if each is not None)
        return self.router.logits, self.entering, *inner, *results, *ends


def mixture_parts(value: Value) -> tuple[Combine, Value | None] | None:
    """The experts' sum and what is added to it; None where a value is no mixture's result.

    What is added is a product with a weight, or one with a sigmoid: a sum of the residual stream
    and a mixture's result is not meant.
    """
    if isinstance(value, Combine):
        return value, None
    if not isinstance(value, Sum):
        return None
    for one, rest in (value.terms, value.terms[::-1]):
        combine = plain(one)
        if isinstance(combine, Combine) and isinstance(chain(rest).source, Linear | Product):
            return combine, rest
    return None


def mixture(combine: Combine, added: Value | None, streams: tuple[Value, ...]) -> Mixture:
    """Recognises a mixture.

    Args:
        combine: the experts' sum.
        added: what is added to it; None for nothing.
        streams: values at which the operand's steps end.

    Raises:
        NoDecoderError: names the first value that is another.
    """
    router = router_of(combine.weights, *streams)
    experts = tuple(_expert(*term, combine.weights, streams) for term in combine.terms)
    if added is None:
        return Mixture(router, experts)
    result, gate = added, None
    if isinstance(plain(added), Product):
        result, gate = _gated(expect(added, Product, "the shared expert's result"))
    made = chain(result)
    shared = feed_forward_of(made.the(Linear, "the shared expert's result"), streams)
    before = None if gate is None else chain(gate.source, *streams)
    return Mixture(router, experts, shared, made, gate, before)


def _expert(column: int, result: Value, weights: Value, streams: tuple[Value, ...]) -> Expert:
    made = chain(result)
    part = feed_forward_of(made.the(Linear, f"the result of expert {column}"), streams)
    chosen = part.entering.source
    if part.entering.steps or not isinstance(chosen, ChosenTokens):
        return Expert(column, None, plain(weights), part, made)
    entering = chain(chosen.source, *streams)
    part = FeedForward(part.activation, part.gate, part.up, entering, part.into, part.down)
    return Expert(column, chosen.expert, plain(chosen.weights), part, made)


def _gated(product: Product) -> tuple[Value, Linear]:
    for one, rest in (product.factors, product.factors[::-1]):
        sigmoid = plain(one)
        if isinstance(sigmoid, Sigmoid):
            return rest, expect(sigmoid.source, Linear, "the gate of the shared expert")
    raise other(product, "a product with the sigmoid of the shared expert's gate")
