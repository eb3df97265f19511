"""Recognises a decoder in what an entry point computes, from the logits back to the tokens.

Products, sums, attentions and convolutions are a decoder's skeleton, which is one for all families;
a part with a recurrence is one whole in it.
What stands between them (norms, biases, factors, bounds, rotations) is kept as it is found, for
`edgeforge.verification.meaning.layers` to hold against the checkpoint's spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from edgeforge.verification.meaning.attending import Attending, attending, gated_attention
from edgeforge.verification.meaning.chains import (
    Chain,
    NoDecoderError,
    Step,
    chain,
    described,
    expect,
    other,
    plain,
)
from edgeforge.verification.meaning.feed_forward import FeedForward, feed_forward_of
from edgeforge.verification.meaning.head_mixture import HeadMixture, head_mixture
from edgeforge.verification.meaning.mixture import Mixture, mixture, mixture_parts
from edgeforge.verification.meaning.recurring import (
    Recurring,
    has_recurrence,
    is_channel_mix,
    recurring,
)
from edgeforge.verification.meaning.router import Router
from exporters.lifted import (
    Embedding,
    Last,
    Linear,
    Product,
    Recent,
    ShortConv,
    Sum,
    Value,
)
from exporters.lifted_mixture import Combine


@dataclass(frozen=True)
class Convolving:
    """The part of a layer that mixes tokens by a gated short convolution.

    Attributes:
        convolution: the convolution.
        factors: how the two factors of its operand are made, of ``into``.
        gate: how the factor of its result is made, of ``into``.
        convolved: the steps between the convolution and the product with the gate.
        entering: how the operand of ``into`` is made, of the residual stream.
        into: the product that gives gate and factors.
        out: the product of the gated result.
    """

    convolution: ShortConv
    factors: tuple[Chain, Chain]
    gate: Chain
    convolved: Chain
    entering: Chain
    into: Linear
    out: Linear

    def products(self) -> tuple[Linear, ...]:
        """Its products with weights."""
        return self.into, self.out

    def chains(self) -> tuple[Chain, ...]:
        """Its chains of steps."""
        return *self.factors, self.gate, self.convolved, self.entering


Mixer = Attending | HeadMixture | Convolving | Recurring
"""The part of a layer that mixes tokens."""


@dataclass(frozen=True)
class Layer:
    """One layer, as an entry point computes it.

    Attributes:
        mixer: the part that mixes tokens.
        mixed: the steps between its last product and the residual stream.
        feed_forward: the part that works token by token.
        fed: the steps between its last product and the residual stream.
        parallel: whether both parts read the residual stream before the layer.
        result: the residual stream after the layer.
    """

    mixer: Mixer
    mixed: Chain
    feed_forward: FeedForward | Mixture | Recurring
    fed: Chain
    parallel: bool
    result: Value

    def routers(self) -> tuple[Router, ...]:
        """The routers of its mixtures of experts, attention's first, as in the program."""
        found = []
        if isinstance(self.mixer, HeadMixture):
            found.append(self.mixer.router)
        if isinstance(self.feed_forward, Mixture):
            found.append(self.feed_forward.router)
        return tuple(found)

    def chains(self) -> tuple[Chain, ...]:
        """Its chains of steps."""
        return *self.mixer.chains(), self.mixed, *self.feed_forward.chains(), self.fed


@dataclass(frozen=True)
class Decoder:
    """A whole entry point.

    Attributes:
        embedding: the lookup of the tokens' rows.
        embedded: the steps between it and the first layer.
        layers: the layers, from the first to the last.
        final: the steps after the last layer.
        norm_matrix: the product between last norm and head, as in a rotated model.
        head: the product that gives the logits.
        logits: the steps between it and the result.
        last: of how many last tokens the logits are; 0 for all.
    """

    embedding: Embedding
    embedded: Chain
    layers: tuple[Layer, ...]
    final: Chain
    norm_matrix: Linear | None
    head: Linear
    logits: Chain
    last: int

    def steps(self) -> list[Step]:
        """Every step, once."""
        each = [self.embedded, self.final, self.logits]
        for layer in self.layers:
            each += layer.chains()
        return list(dict.fromkeys(step for chain in each for step in chain.steps))

    def convolutions(self) -> Iterator[ShortConv]:
        """Every convolution."""
        for layer in self.layers:
            if isinstance(layer.mixer, Convolving):
                yield layer.mixer.convolution
        for part in self.recurring():
            yield from part.of(ShortConv)

    def recurring(self) -> Iterator[Recurring]:
        """Every part with a recurrence or a shift."""
        for layer in self.layers:
            for part in (layer.mixer, layer.feed_forward):
                if isinstance(part, Recurring):
                    yield part

    def states(self) -> Iterator[Recent]:
        """Every state that is no cache."""
        for layer in self.layers:
            if isinstance(layer.mixer, Convolving):
                yield layer.mixer.convolution.recent
        for part in self.recurring():
            yield from part.states()

    def products(self) -> list[Linear]:
        """Every product with a weight."""
        inner = [
            product
            for layer in self.layers
            for product in (*layer.mixer.products(), *layer.feed_forward.products())
        ]
        return [*inner, *([self.norm_matrix] if self.norm_matrix else []), self.head]


def decoder_of(logits: Value) -> Decoder:
    """Recognises the decoder that gives these logits.

    Raises:
        NoDecoderError: names the first value, from the end, that is another.
    """
    after = chain(logits)
    head = after.the(Linear, "the logits")
    matrix, operand = None, head.source
    if isinstance(plain(operand), Linear):
        matrix = cast(Linear, plain(operand))
        operand = matrix.source
    final = chain(operand)
    layers: list[Layer] = []
    stream = final.source
    while not isinstance(chain(stream).source, Embedding):
        layer, stream = _layer(stream)
        layers.append(layer)
    embedded = chain(stream)
    return Decoder(
        expect(embedded.source, Embedding, "the embedding"),
        embedded,
        tuple(reversed(layers)),
        final,
        matrix,
        head,
        after,
        _last_rows(logits),
    )


def _layer(stream: Value) -> tuple[Layer, Value]:
    """The layer that ends in a value of the residual stream, and the value before the layer."""
    middle, fed = _residual(stream, "the feed-forward part")
    before, mixed = _residual(middle, "attention")
    feed_forward = _fed(fed, middle, before)
    mixer = _mixer(mixed, before)
    _same(mixer.entering.source, before, "attention's norm")
    parallel = feed_forward.entering.source is plain(before)
    if not parallel:
        _same(feed_forward.entering.source, middle, "the feed-forward part's norm")
    return Layer(mixer, mixed, feed_forward, fed, parallel, plain(stream)), before


def _mixer(mixed: Chain, before: Value) -> Mixer:
    if isinstance(mixed.source, Combine):
        return head_mixture(mixed.source, before)
    out = mixed.the(Linear, "attention's result")
    operand = plain(out.source)
    if has_recurrence(operand, before):
        return recurring(plain(mixed.source), before)
    if isinstance(operand, Product) and not gated_attention(operand):
        return _convolving(out, operand, before)
    return attending(out, before)


def _fed(fed: Chain, middle: Value, before: Value) -> FeedForward | Mixture | Recurring:
    parts = mixture_parts(fed.source)
    if parts is not None:
        return mixture(*parts, (middle, before))
    if is_channel_mix(fed.source):
        return recurring(fed.source, middle, before)
    down = fed.the(Linear, "the result of the feed-forward part")
    return feed_forward_of(down, (middle, before))


def _convolving(out: Linear, product: Product, before: Value) -> Convolving:
    what = "a product of a gate and a convolution's result"
    ends = [chain(factor) for factor in product.factors]
    (convolved,) = [end for end in ends if isinstance(end.source, ShortConv)] or (None,)
    if convolved is None:
        raise other(product, what)
    (gate,) = [end for end in ends if end is not convolved]
    convolution = convolved.the(ShortConv, what)
    operand = expect(convolution.source, Product, "the operand of a convolution")
    first, second = (chain(factor) for factor in operand.factors)
    into = gate.the(Linear, "the convolution's gate")
    for each in (first, second):
        if each.source is not into:
            raise other(each.source, "columns of the product that gives the convolution's gate")
    entering = chain(into.source, before)
    return Convolving(convolution, (first, second), gate, convolved, entering, into, out)


def _residual(stream: Value, what: str) -> tuple[Value, Chain]:
    """The stream before a branch was added, and the branch: a product's result or a mixture's."""
    total = expect(stream, Sum, f"the residual stream after {what}")
    first, second = (chain(term) for term in total.terms)
    if _ends_branch(second.source):
        return plain(total.terms[0]), second
    if _ends_branch(first.source):
        return plain(total.terms[1]), first
    raise other(second.source, f"the result of {what}, which a product gives")


def _ends_branch(value: Value) -> bool:
    return isinstance(value, Linear) or is_channel_mix(value) or mixture_parts(value) is not None


def _same(found: Value, wanted: Value, what: str) -> None:
    if plain(found) is not plain(wanted):
        raise NoDecoderError(
            f"{what} reads {described(plain(found))}, not the residual stream "
            f"{described(plain(wanted))}"
        )


def _last_rows(logits: Value) -> int:
    """How many last tokens' rows are selected anywhere on the way to the logits; 0 for all."""
    waiting, seen = [logits], set[Value]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Last):
            return value.positions
        if value not in seen:
            seen.add(value)
            for given in vars(value).values():
                parts = given if isinstance(given, tuple) else (given,)
                waiting.extend(part for part in parts if isinstance(part, Value))
    return 0
