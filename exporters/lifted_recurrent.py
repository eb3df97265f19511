"""What recurrent layers compute, in the vocabulary of `exporters.lifted`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exporters.lifted import Array, Recent, StoredWeight, Value

FunctionName = Literal["tanh", "relu", "exp", "softplus"]


@dataclass(frozen=True, eq=False)
class Function(Value):
    """A function of each element by itself: tanh, relu, exp, or ``log(1 + exp(x))`` (softplus)."""

    source: Value
    function: FunctionName


@dataclass(frozen=True, eq=False)
class Gain(Value):
    """``source * values``: a weight's factor for each column, or for each head (`dialect.GAIN`).

    Attributes:
        source: what is multiplied.
        weight: the factors' weight.
        values: its values, ``float32[n]``, or ``float32[h, 1]``.
    """

    source: Value
    weight: StoredWeight
    values: Array


@dataclass(frozen=True, eq=False)
class UnitNorm(Value):
    """``x / sqrt(sum(x ** 2) + epsilon)`` over the last dimension (``edgeforge::l2_norm``)."""

    source: Value
    epsilon: float


@dataclass(frozen=True, eq=False)
class Previous(Value):
    """Each token's predecessor (``edgeforge::token_shift``).

    Attributes:
        source: the tokens.
        recent: the state, which holds the last token: ``3.recent`` of layer 3's mix of tokens,
            ``3.mlp_recent`` of its mix of channels, where states have names.
    """

    source: Value
    recent: Recent


@dataclass(frozen=True, eq=False)
class Recurrence(Value):
    """A recurrence over a memory (``edgeforge::recurrence``); views are not lifted.

    Attributes:
        query: the queries.
        key: the keys.
        value: the values.
        decay: the logarithm of what is kept: a value; or the weight that is the same for all
            tokens.
        decays: the weight's values, ``float32[h, n]``; None where ``decay`` is a value.
        bonus: the weight of a token's own key; None where a token is read after it was added.
        bonuses: its values, ``float32[h, n]``.
        beta: how far values replace; None where they are added.
        dimensions: heads, heads of queries and keys, the memory's rows and columns.
        memory: the state, named as caches are: ``3.memory`` for layer 3 where states have names.
    """

    query: Value
    key: Value
    value: Value
    decay: Value | StoredWeight
    decays: Array | None
    bonus: StoredWeight | None
    bonuses: Array | None
    beta: Value | None
    dimensions: tuple[int, int, int, int]
    memory: Recent
