"""Forms: what values must be computed of, to be held against what a file computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from edgeforge.verification.meaning.chains import described, plain
from edgeforge.verification.meaning.recurring import operands
from exporters.lifted import Product, StoredWeight, Sum, Value

_SLACK: Final = 4e-3  # of numbers, which files may hold as float16


@dataclass(frozen=True, eq=False)
class Form:
    """A value and what it is computed of.

    Attributes:
        kind: its kind; None for the operand of the whole form.
        words: what it is, in words.
        fact: the fact that is otherwise where another value stands in its place.
        of: the forms of its operands, in the order of its fields; those of a sum or a product may
            stand in any order.
        weights: the names of the weights that it reads by its fields' names, None for no weight.
        numbers: the numbers and names that it has, by its fields' names.
        own_facts: the facts of weights that have one of their own, by the fields' names.
    """

    kind: type[Value] | None
    words: str
    fact: str
    of: tuple[Form, ...] = ()
    weights: Mapping[str, str | None] = field(default_factory=dict)
    numbers: Mapping[str, object] = field(default_factory=dict)
    own_facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many values it consists of."""
        return 1 + sum(each.size for each in self.of)

    def facts(self) -> set[str]:
        """Every fact that it can find otherwise."""
        own = {self.fact, *self.own_facts.values()}
        return own.union(*(each.facts() for each in self.of))


@dataclass(frozen=True)
class Difference:
    """Where a value is not as its form says.

    Attributes:
        fact: the fact that is otherwise.
        words: what was found and what was expected.
        cost: how much of the form is left without a value; it decides which operand is which.
    """

    fact: str
    words: str
    cost: int = 1


class Matching:
    """Compares values with forms.

    Args:
        operand: the operand of the whole form.
    """

    def __init__(self, operand: Value) -> None:
        self.operand = plain(operand)
        self._known: dict[tuple[Value, Form], list[Difference]] = {}

    def differences(self, value: Value, form: Form) -> list[Difference]:
        """Where a value is not as a form says; empty where it is."""
        value = plain(value)
        key = value, form
        if key not in self._known:
            self._known[key] = self._compared(value, form)
        return self._known[key]

    def _compared(self, value: Value, form: Form) -> list[Difference]:
        if form.kind is None:
            return [] if value is self.operand else [_replaced(value, form)]
        if not isinstance(value, form.kind):
            return [_replaced(value, form)]
        given, count = operands(value), len(form.of)
        if len(given) != count:
            words = f"{described(value)} is made of {len(given)} values, not of {count}"
            return [Difference(form.fact, f"{words}, as {form.words} must be", form.size)]
        own = [*_weights(value, form), *_numbers(value, form)]
        found = self._operands(given, form.of)
        if isinstance(value, Sum | Product):
            turned = self._operands(given[::-1], form.of)
            found = min(found, turned, key=lambda each: sum(d.cost for d in each))
        return [*own, *found]

    def _operands(self, given: list[Value], forms: tuple[Form, ...]) -> list[Difference]:
        pairs = zip(given, forms, strict=True)
        return [each for value, form in pairs for each in self.differences(value, form)]


def _replaced(value: Value, form: Form) -> Difference:
    words = f"{described(value)} stands where {form.words} should be"
    return Difference(form.fact, words, form.size)


def _weights(value: Value, form: Form) -> list[Difference]:
    found = []
    for name, wanted in form.weights.items():
        weight = getattr(value, name)
        own = weight.name if isinstance(weight, StoredWeight) else None
        if own != wanted:
            words = f"{form.words} reads {own or 'no weight'} where it must read {wanted or 'none'}"
            found.append(Difference(form.own_facts.get(name, form.fact), words))
    return found


def _numbers(value: Value, form: Form) -> list[Difference]:
    found = []
    for name, wanted in form.numbers.items():
        number = getattr(value, name)
        near = number == wanted
        if isinstance(wanted, float):
            near = math.isclose(number, wanted, rel_tol=_SLACK)
            number, wanted = f"{number:.6g}", f"{wanted:.6g}"
        if not near:
            what = f"{form.words} has the {name.replace('_', ' ')} {number}, not {wanted}"
            found.append(Difference(form.fact, what))
    return found
