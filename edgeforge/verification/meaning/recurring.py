"""Finds the parts of a layer that see the tokens before by a recurrence or by a shift.

What they consist of is not recognised here, one step after another, as other parts are: it is held
as a whole against the form that the checkpoint's spec says (`meaning.recurrent_forms`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

from edgeforge.verification.meaning.chains import Chain, Step, chain, other, plain
from exporters.lifted import (
    Linear,
    Product,
    Recent,
    ShortConv,
    Sigmoid,
    Value,
)
from exporters.lifted_recurrent import (
    Previous,
    Recurrence,
)

Kind = TypeVar("Kind", bound=Value)


@dataclass(frozen=True)
class Recurring:
    """A mixer of tokens with a recurrence, or RWKV's mix of channels.

    Attributes:
        result: its last value, before the steps that lead to the residual stream.
        entering: how its operand is made, of the residual stream.
        operand: its operand.
        values: every value between the two, the result among them.
    """

    result: Value
    entering: Chain
    operand: Value
    values: tuple[Value, ...]

    def of(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """Its values of a kind."""
        return tuple(value for value in self.values if isinstance(value, kind))

    def products(self) -> tuple[Linear, ...]:
        """Its products with weights."""
        return self.of(Linear)

    def chains(self) -> tuple[Chain, ...]:
        """Its steps, as the chains that other parts have, and how its operand is made."""
        steps = tuple(value for value in self.values if isinstance(value, Step))
        return Chain(steps, None, self.result), self.entering

    def states(self) -> Iterator[Recent]:
        """Every state that it keeps."""
        for value in self.values:
            if isinstance(value, ShortConv | Previous):
                yield value.recent
            elif isinstance(value, Recurrence):
                yield value.memory


def has_recurrence(result: Value, *streams: Value) -> bool:
    """Whether a recurrence is computed between the residual stream and a part's result."""
    return any(isinstance(value, Recurrence) for value in _within(result, streams))


def is_channel_mix(result: Value) -> bool:
    """Whether a value is a product with the sigmoid of another product, as RWKV's mix has it."""
    if not isinstance(result, Product):
        return False
    first, second = (plain(factor) for factor in result.factors)
    for one, rest in ((first, second), (second, first)):
        if isinstance(one, Sigmoid) and isinstance(rest, Linear):
            return isinstance(plain(one.source), Linear)
    return False


def recurring(result: Value, *streams: Value) -> Recurring:
    """Finds a part that ends in a value.

    Its operand is what it looks back at (`Previous`), or what the product before its convolution
    reads.

    Raises:
        NoDecoderError: it looks back at nothing.
    """
    within = _within(result, streams)
    shifts = [value for value in within if isinstance(value, Previous)]
    convolutions = [value for value in within if isinstance(value, ShortConv)]
    if shifts:
        operand = plain(shifts[0].source)
    elif convolutions:
        into = chain(convolutions[0].source)
        operand = plain(into.the(Linear, "the operand of a recurrence's convolution").source)
    else:
        raise other(result, "a recurrence behind a convolution or a shift")
    values = _within(result, (*streams, operand))
    return Recurring(result, chain(operand, *streams), operand, tuple(values))


def operands(value: Value) -> list[Value]:
    """The values that a value is computed of, in the order of its fields."""
    found = []
    for field in fields(value):
        given = getattr(value, field.name)
        parts = given if isinstance(given, tuple) else (given,)
        found += [part for part in parts if isinstance(part, Value)]
    return found


def _within(result: Value, ends: tuple[Value, ...]) -> list[Value]:
    """The values of which a result is computed, up to some, without these."""
    stops, found, waiting = [plain(end) for end in ends], dict[Value, None](), [result]
    while waiting:
        value = plain(waiting.pop())
        if value not in stops and value not in found:
            found[value] = None
            waiting += operands(value)
    return list(found)
