"""Recognises how tokens choose the experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

from edgeforge.verification.meaning.chains import Chain, chain, other, plain
from exporters.lifted import Linear, Value
from exporters.lifted_mixture import Route, RouteSparseMixer


@dataclass(frozen=True)
class Router:
    """What gives each token its weights of a mixture's experts.

    Attributes:
        route: the rule by which experts are chosen.
        logits: the steps between the product and the rule.
        product: the product with the router's weight.
        entering: how the operand of the product is made, of the residual stream.
    """

    route: Route | RouteSparseMixer
    logits: Chain
    product: Linear
    entering: Chain


def router_of(weights: Value, *streams: Value) -> Router:
    """Recognises the router that gives a mixture's weights.

    Args:
        weights: each token's weight of each expert, of all tokens or of the last ones.
        streams: values at which the operand's steps end.

    Raises:
        NoDecoderError: names the first value that is another.
    """
    route = plain(weights)
    if not isinstance(route, Route | RouteSparseMixer):
        raise other(route, "the choice of experts")
    logits = chain(route.source)
    product = logits.the(Linear, "the router's logits")
    return Router(route, logits, product, chain(product.source, *streams))
