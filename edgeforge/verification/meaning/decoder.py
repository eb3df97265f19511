"""Recognises a decoder in what an entry point computes, from the logits back to the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from exporters.lifted import (
    NO_NEW_ROWS,
    Attention,
    Columns,
    Embedding,
    Last,
    Linear,
    Norm,
    Product,
    Rope,
    Silu,
    Sum,
    Unknown,
    Value,
)

Kind = TypeVar("Kind", bound=Value)


class NoDecoderError(ValueError):
    """What an entry point computes is not the decoder that EdgeForge lowers.

    Attributes:
        fact: the fact that is otherwise.
    """

    def __init__(self, message: str, fact: str = "structure") -> None:
        super().__init__(message)
        self.fact = fact


@dataclass(frozen=True)
class Projected:
    """Queries or keys: columns of a product, and what is done to them.

    Attributes:
        columns: the columns that are taken of the product.
        norm: the norm of each head; None where there is none.
        rope: the rotary embedding; None where there is none.
    """

    columns: Columns
    norm: Norm | None
    rope: Rope | None


@dataclass(frozen=True)
class Layer:
    """One layer, as an entry point computes it.

    Attributes:
        attention: the attention.
        query: its queries.
        key: its keys.
        qk: the product that gives queries and keys.
        v: the product that gives values.
        o: the product of attention's result.
        gate: the columns to which SiLU is applied.
        up: the columns that they are multiplied with.
        gate_up: the product of which both are columns.
        down: the product of the feed-forward part's result.
        input_norm: the norm before attention; None where there is none.
        post_norm: the norm before the feed-forward part; None where there is none.
        result: the residual stream after the layer.
    """

    attention: Attention
    query: Projected
    key: Projected
    qk: Linear
    v: Linear
    o: Linear
    gate: Columns
    up: Columns
    gate_up: Linear
    down: Linear
    input_norm: Norm | None
    post_norm: Norm | None
    result: Value


@dataclass(frozen=True)
class Decoder:
    """A whole entry point.

    Attributes:
        embedding: the lookup of the tokens' rows.
        layers: the layers, from the first to the last.
        final_norm: the norm after the last layer; None where there is none.
        norm_matrix: the product between last norm and head, as in a rotated model.
        head: the product that gives the logits.
        last: of how many last tokens the logits are; 0 for all.
    """

    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    norm_matrix: Linear | None
    head: Linear
    last: int

    def norms(self) -> list[Norm]:
        """Every norm that is there."""
        each = [self.final_norm]
        for layer in self.layers:
            each += [layer.input_norm, layer.query.norm, layer.key.norm, layer.post_norm]
        return [norm for norm in each if norm is not None]

    def products(self) -> list[Linear]:
        """Every product with a weight."""
        inner = [
            product
            for layer in self.layers
            for product in (layer.qk, layer.v, layer.o, layer.gate_up, layer.down)
        ]
        return [*inner, *([self.norm_matrix] if self.norm_matrix else []), self.head]


def decoder_of(logits: Value) -> Decoder:
    """Recognises the decoder that gives these logits.

    Raises:
        NoDecoderError: names the first value, from the end, that is another.
    """
    value = logits
    head = _linear(value, "the logits")
    value, norm_matrix = head.source, None
    found = _plain(value)
    if isinstance(found, Linear):
        norm_matrix, value = found, found.source
    last = _last_rows(value) or _last_rows(head)
    final_norm, stream = _norm_of(value)
    last = last or _last_rows(stream)
    layers: list[Layer] = []
    stream = _plain(stream)
    while not isinstance(stream, Embedding):
        layer, before, selected = _layer(stream)
        last = last or (0 if layers else selected)
        layers.append(layer)
        stream = _plain(before)
    return Decoder(stream, tuple(reversed(layers)), final_norm, norm_matrix, head, last)


def _layer(stream: Value) -> tuple[Layer, Value, int]:
    """The layer that ends in a value of the residual stream, and the value before the layer."""
    middle, down = _residual(stream, "the feed-forward part")
    gated = _expect(down.source, Product, "the operand of the last product of a feed-forward part")
    gate, up = _gated(gated)
    gate_up = _linear(gate.source, "the gate")
    if _plain(up.source) is not gate_up:
        raise _other(up, "columns of the product that gives the gate")
    post_norm, normed_of = _norm_of(gate_up.source)
    _same(normed_of, middle, "the feed-forward part's norm")
    before, o = _residual(_plain(middle), "attention")
    attention = _attention(o.source)
    query, key = (_projected(each) for each in (attention.query, attention.key))
    qk, v = _linear(query.columns.source, "the queries"), _linear(attention.value, "the values")
    if _plain(key.columns.source) is not qk:
        raise NoDecoderError(
            f"{_described(attention)} reads keys of {_described(key.columns)}, which belong to "
            f"another layer than its queries",
            "caches",
        )
    input_norm, normed_of = _norm_of(qk.source)
    _same(normed_of, before, "attention's norm")
    also, _ = _norm_of(v.source)
    if also is not input_norm or _plain(v.source) is not _plain(qk.source):
        raise NoDecoderError(
            f"{_described(attention)} reads values that are made of {_described(v.source)}, which "
            f"its queries are not made of",
            "caches",
        )
    layer = Layer(
        attention, query, key, qk, v, o, gate, up, gate_up, down, input_norm, post_norm, stream
    )
    return layer, before, _last_rows(middle) or _last_rows(before) or _last_rows(o.source)


def _attention(value: Value) -> Attention:
    inner = _plain(value)
    if isinstance(inner, Unknown) and inner.kind == NO_NEW_ROWS:
        raise NoDecoderError(f"{inner.name} is {NO_NEW_ROWS}", "caches")
    return _expect(value, Attention, "the operand of attention's last product")


def _residual(stream: Value, what: str) -> tuple[Value, Linear]:
    """The stream before a branch was added, and the product with which the branch ends."""
    total = _expect(stream, Sum, f"the residual stream after {what}")
    first, second = (_plain(term) for term in total.terms)
    if isinstance(second, Linear):
        return total.terms[0], second
    if isinstance(first, Linear):
        return total.terms[1], first
    raise _other(second, f"the result of {what}, which a product gives")


def _gated(gated: Product) -> tuple[Columns, Columns]:
    for one, other in (gated.factors, gated.factors[::-1]):
        inner = _plain(one)
        if isinstance(inner, Silu):
            return (
                _expect(inner.source, Columns, "the operand of SiLU"),
                _expect(other, Columns, "the factor of SiLU's result"),
            )
    raise _other(gated, "a product with SiLU's result")


def _projected(value: Value) -> Projected:
    inner, rope = _plain(value), None
    if isinstance(inner, Rope):
        rope, inner = inner, _plain(inner.source)
    norm = None
    if isinstance(inner, Norm):
        norm, inner = inner, _plain(inner.source)
    return Projected(_expect(inner, Columns, "queries or keys"), norm, rope)


def _norm_of(value: Value) -> tuple[Norm | None, Value]:
    """A norm, if the value is one, and what it normalises."""
    inner = _plain(value)
    return (inner, inner.source) if isinstance(inner, Norm) else (None, value)


def _same(found: Value, wanted: Value, what: str) -> None:
    if _plain(found) is not _plain(wanted):
        raise NoDecoderError(
            f"{what} reads {_described(_plain(found))}, not the residual stream "
            f"{_described(_plain(wanted))}"
        )


def _linear(value: Value, what: str) -> Linear:
    return _expect(value, Linear, what)


def _expect(value: Value, kind: type[Kind], what: str) -> Kind:
    inner = _plain(value)
    if not isinstance(inner, kind):
        raise _other(inner, what)
    return inner


def _other(value: Value, wanted: str) -> NoDecoderError:
    return NoDecoderError(f"{_described(_plain(value))} stands where {wanted} should be")


def _described(value: Value) -> str:
    kind = value.kind if isinstance(value, Unknown) else type(value).__name__.lower()
    return f"{value.name or 'a value'} ({kind})"


def _plain(value: Value) -> Value:
    """The value of which the last token's row is selected; any other value itself."""
    while isinstance(value, Last):
        value = value.source
    return value


def _last_rows(value: Value) -> int:
    return value.positions if isinstance(value, Last) else 0
