"""Recognises a part of a layer that mixes tokens by attention in what an entry point computes."""

from __future__ import annotations

from dataclasses import dataclass

from edgeforge.verification.meaning.chains import (
    Chain,
    NoDecoderError,
    chain,
    described,
    expect,
    plain,
)
from exporters.lifted import (
    NO_NEW_ROWS,
    Attention,
    Linear,
    Product,
    ShortConv,
    Sigmoid,
    Unknown,
    Value,
)


@dataclass(frozen=True)
class Attending:
    """The part of a layer that mixes tokens by attention.

    Attributes:
        attention: the attention.
        query: how its queries are made, of ``qk``.
        key: how its keys are made, of ``qk``.
        value: how its values are made, of ``v``.
        entering: how the operand of ``qk`` and ``v`` is made, of the residual stream.
        qk: the product that gives queries and keys.
        v: the product that gives values.
        out: the product of attention's result.
        gate: how the gate of attention's result is made; None where it has none.
        gated: how the operand of the gate's product is made, of the residual stream.
    """

    attention: Attention
    query: Chain
    key: Chain
    value: Chain
    entering: Chain
    qk: Linear
    v: Linear
    out: Linear
    gate: Chain | None = None
    gated: Chain | None = None

    def products(self) -> tuple[Linear, ...]:
        """Its products with weights."""
        gate = () if self.gate is None else (self.gate.the(Linear, "the gate"),)
        return self.qk, self.v, *gate, self.out

    def chains(self) -> tuple[Chain, ...]:
        """Its chains of steps."""
        gate = [each for each in (self.gate, self.gated) if each is not None]
        return self.query, self.key, self.value, self.entering, *gate


def gated_attention(product: Product) -> tuple[Value, Sigmoid] | None:
    """Attention's result and the sigmoid that it is multiplied by; None where it is no such."""
    factors = [plain(factor) for factor in product.factors]
    for one, other_factor in (factors, factors[::-1]):
        if isinstance(one, Sigmoid) and not isinstance(chain(other_factor).source, ShortConv):
            return other_factor, one
    return None


def attending(out: Linear, before: Value) -> Attending:
    """Recognises attention and its projections.

    Args:
        out: the product of attention's result.
        before: the residual stream before the layer.

    Raises:
        NoDecoderError: names the first value that is another.
    """
    operand, gate, gated = plain(out.source), None, None
    parts = gated_attention(operand) if isinstance(operand, Product) else None
    if parts is not None:
        operand, gate = parts[0], chain(parts[1].source)
        gated = chain(gate.the(Linear, "the gate of attention's result").source, before)
    attention = attention_of(operand)
    query, key, value = (chain(each) for each in (attention.query, attention.key, attention.value))
    qk, v = query.the(Linear, "the queries"), value.the(Linear, "the values")
    if key.source is not qk:
        found = key.source if key.columns is None else key.columns
        raise NoDecoderError(
            f"{described(attention)} reads keys of {described(found)}, which belong to "
            f"another layer than its queries",
            "caches",
        )
    entering, also = chain(qk.source, before), chain(v.source, before)
    if also.source is not entering.source or not same_steps(also, entering):
        raise NoDecoderError(
            f"{described(attention)} reads values that are made of {described(v.source)}, which "
            f"its queries are not made of",
            "caches",
        )
    if gated is not None and (
        gated.source is not entering.source or not same_steps(gated, entering)
    ):
        raise NoDecoderError(
            f"the gate of {described(attention)} is made of {described(gated.source)}, which its "
            f"queries are not made of"
        )
    return Attending(attention, query, key, value, entering, qk, v, out, gate, gated)


def same_steps(one: Chain, another: Chain) -> bool:
    """Whether two chains have the same steps and columns."""
    return one.steps == another.steps and one.columns is another.columns


def attention_of(value: Value) -> Attention:
    """The attention whose result a value is.

    Raises:
        NoDecoderError: it is none.
    """
    inner = plain(value)
    if isinstance(inner, Unknown) and inner.kind == NO_NEW_ROWS:
        raise NoDecoderError(f"{inner.name} is {NO_NEW_ROWS}", "caches")
    return expect(value, Attention, "the operand of attention's last product")
