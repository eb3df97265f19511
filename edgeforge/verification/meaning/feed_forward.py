"""Recognises a gated or plain feed-forward part in what an entry point computes."""

from __future__ import annotations

from dataclasses import dataclass

from edgeforge.verification.meaning.chains import Chain, chain, other, plain
from exporters.lifted import Gelu, Linear, Product, Silu, Value

Activation = Silu | Gelu


@dataclass(frozen=True)
class FeedForward:
    """The part of a layer that works token by token.

    Attributes:
        activation: the activation function.
        gate: how its operand is made, of ``into``.
        up: how the factor of its result is made, of ``into``; None where there is none.
        entering: how the operand of ``into`` is made, of the residual stream.
        into: the first product.
        down: the last product.
    """

    activation: Activation
    gate: Chain
    up: Chain | None
    entering: Chain
    into: Linear
    down: Linear

    def products(self) -> tuple[Linear, ...]:
        """Its products with weights."""
        return self.into, self.down

    def chains(self) -> tuple[Chain, ...]:
        """Its chains of steps."""
        return self.gate, *([self.up] if self.up else []), self.entering


def feed_forward_of(down: Linear, streams: tuple[Value, ...]) -> FeedForward:
    """Recognises the part that ends in a product.

    Args:
        down: the product.
        streams: values at which the operand's steps end.

    Raises:
        NoDecoderError: it is another.
    """
    what = "the operand of the last product of a feed-forward part"
    operand, up = plain(down.source), None
    if isinstance(operand, Product):
        activation, factor = _gated(operand)
        up = chain(factor)
    else:
        if not isinstance(operand, Activation):
            raise other(operand, what)
        activation = operand
    gate = chain(activation.source)
    into = gate.the(Linear, "the gate")
    if up is not None and up.source is not into:
        raise other(up.source, "columns of the product that gives the gate")
    return FeedForward(activation, gate, up, chain(into.source, *streams), into, down)


def _gated(product: Product) -> tuple[Activation, Value]:
    for one, factor in (product.factors, product.factors[::-1]):
        inner = plain(one)
        if isinstance(inner, Activation):
            return inner, factor
    raise other(product, "a product with SiLU's result")
