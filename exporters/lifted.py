"""What an artifact computes, read from its files, in one small vocabulary for all targets.

A target's reader walks an entry point of the written files and lifts it into the values below: a
norm that a file holds as seven operations is one `Norm` again. What the reader does not recognise
stays an `Unknown`, with the operands that it had.

Whole numbers that depend on where a call begins (positions, bounds of slices, masks) are not
matched by their form: they are computed for a few `Probe` calls, whatever operations compute them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy.typing as npt

Array = npt.NDArray[Any]
Precision = Literal["float32", "float16", "int8", "int8-token", "int8-tensor"]
"""The activations of a product: floats, or 8-bit integers that the kernel (``int8``) or the plan
(``int8-token``, ``int8-tensor``) rounds them to."""

NO_NEW_ROWS: Final = "attention over a cache without the new rows"
"""The kind of an `Unknown` that would be an `Attention` if its caches held the call's own rows."""


@dataclass(frozen=True)
class Probe:
    """A call for which whole numbers are computed.

    Attributes:
        start: how many tokens are cached before the call.
        count: how many tokens the call takes.
    """

    start: int
    count: int


def probes_of(context: int, counts: tuple[int, ...]) -> tuple[Probe, ...]:
    """Calls at the beginning, in the middle and at the end of a context.

    Args:
        context: the declared context, tokens.
        counts: the numbers of tokens that a call may take.

    >>> probes_of(16, (4,))
    (Probe(start=0, count=4), Probe(start=7, count=4), Probe(start=12, count=4))
    """
    found: dict[Probe, None] = {}
    for count in counts:
        count = min(count, context)
        for start in (0, context // 2 - 1, context - count):
            found[Probe(max(0, min(start, context - count)), count)] = None
    return tuple(found)


@dataclass(frozen=True)
class StoredFormat:
    """How the file holds a weight.

    Attributes:
        kind: ``int``, ``palette``, or a float dtype: ``fp32``, ``fp16``, ``bf16``.
        bits: bits of a code; 0 for floats.
        groups: scales of a row, or tables of a palette; 0 for floats.
        zero_points: whether groups have zero points of their own.
    """

    kind: str
    bits: int = 0
    groups: int = 0
    zero_points: bool = False

    def __str__(self) -> str:
        if not self.bits:
            return self.kind
        of = "tables" if self.kind == "palette" else "scales a row"
        zeros = ", zero points" if self.zero_points else ""
        return f"{self.bits}-bit {self.kind}, {self.groups} {of}{zeros}"


@dataclass(frozen=True)
class StoredWeight:
    """A weight as an operation reads it.

    Attributes:
        name: the weight's name in the program.
        format: how the file holds it.
    """

    name: str
    format: StoredFormat


@dataclass(frozen=True, eq=False)
class Value:
    """A result in an entry point; two values are equal only where they are the same one.

    Attributes:
        name: as the file calls it.
    """

    name: str


@dataclass(frozen=True, eq=False)
class Tokens(Value):
    """The tokens of a call."""


@dataclass(frozen=True, eq=False)
class Embedding(Value):
    """Rows of a table for the tokens."""

    weight: StoredWeight


@dataclass(frozen=True, eq=False)
class Linear(Value):
    """A product with a weight.

    Attributes:
        source: the activations.
        weight: the weight.
        precision: how the activations are multiplied.
        float_columns: the columns whose activations stay float although the others are rounded.
    """

    source: Value
    weight: StoredWeight
    precision: Precision
    float_columns: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Bias(Value):
    """A weight's vector added to every row: ``source + values``.

    A file that adds it within a product is lifted as a `Bias` of the `Linear`, and one that adds
    it to some columns of a product as a `Bias` of the `Columns`.

    Attributes:
        source: what it is added to.
        weight: the vector's weight.
        values: its values, ``float32[n]``.
    """

    source: Value
    weight: StoredWeight
    values: Array


@dataclass(frozen=True, eq=False)
class Norm(Value):
    """RMSNorm over the last dimension, or over a group of its columns where ``n`` is smaller.

    Queries and keys that are normalised head by head have a norm of ``n`` columns, a head's, and
    those that are normalised together one as wide as all heads; views are not lifted.

    Attributes:
        source: what is normalised.
        weight: the weight of the norm.
        values: the weight's values, ``float32[n]``, as the file multiplies by them.
        epsilon: what is added to the mean of squares.
    """

    source: Value
    weight: StoredWeight
    values: Array
    epsilon: float


@dataclass(frozen=True, eq=False)
class LayerNorm(Value):
    """LayerNorm over the last dimension: the mean is subtracted, whatever the file adds after it.

    A scale or a shift that the file leaves out is None. One that it holds as plain ones or zeros,
    because its operator cannot do without, is a constant and None here too.

    Attributes:
        source: what is normalised.
        weight: the weight of the scale.
        values: its values, ``float32[n]``; None where there is no scale.
        bias: the weight of the shift.
        shift: its values, ``float32[n]``; None where there is none.
        epsilon: what is added to the biased variance.
    """

    source: Value
    weight: StoredWeight | None
    values: Array | None
    bias: StoredWeight | None
    shift: Array | None
    epsilon: float


@dataclass(frozen=True, eq=False)
class Columns(Value):
    """Columns ``start`` to ``stop`` of the last dimension."""

    source: Value
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Silu(Value):
    """``x * sigmoid(x)``."""

    source: Value


@dataclass(frozen=True, eq=False)
class Gelu(Value):
    """GELU.

    Attributes:
        source: its operand.
        tanh: whether it is the form with a tanh, else the exact one with an error function.
    """

    source: Value
    tanh: bool


@dataclass(frozen=True, eq=False)
class Scaled(Value):
    """``source * factor``: one number for all elements; a division is its inverse factor.

    A factor on queries or keys that the file applies in place of attention's own belongs to
    `Attention.scale` and is not lifted as this.
    """

    source: Value
    factor: float


@dataclass(frozen=True, eq=False)
class Softcap(Value):
    """``cap * tanh(source / cap)``, with both numbers equal; otherwise it is an `Unknown`."""

    source: Value
    cap: float


@dataclass(frozen=True, eq=False)
class Clamp(Value):
    """``source`` kept within ``-limit`` and ``limit``; other bounds are an `Unknown`."""

    source: Value
    limit: float


@dataclass(frozen=True, eq=False)
class Product(Value):
    """A product of two values, element by element."""

    factors: tuple[Value, Value]


@dataclass(frozen=True, eq=False)
class Sum(Value):
    """A sum of two values, element by element."""

    terms: tuple[Value, Value]


@dataclass(frozen=True, eq=False)
class Last(Value):
    """The row of the call's last token, or the rows of its last few.

    Attributes:
        source: the rows of all tokens.
        positions: how many rows there are, where the call has as many tokens.
    """

    source: Value
    positions: int = 1


@dataclass(frozen=True, eq=False)
class Rope(Value):
    """A rotary embedding of the first columns of each head.

    Attributes:
        source: what is rotated.
        cos: the stored cosines, ``float[positions, width // 2]``.
        sin: the stored sines, in the same shape.
        rows: the rows of the tables that the call's tokens take, for each probe.
    """

    source: Value
    cos: Array
    sin: Array
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Cache:
    """A layer's cache of keys or values.

    Attributes:
        read: the name of the cache that attention reads.
        written: the name of the cache that gets the new rows.
        length: how many tokens it holds; None where the caller decides.
        rows: the rows that the new tokens get, for each probe.
    """

    read: str
    written: str
    length: int | None
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Attention(Value):
    """Attention over caches.

    Attributes:
        query: the queries.
        key: the new keys.
        value: the new values.
        heads: the number of query heads, of key/value heads, and the width of a head.
        scale: the factor on the scores, with what the file multiplies queries or keys by instead.
        keys: the cache of keys.
        values: the cache of values.
        visible: which tokens each new token sees, ``bool[count, tokens]``, for each probe; tokens
            beyond the array's last are not seen.
        softcap: scores ``s``, scaled and not yet masked, become ``softcap * tanh(s / softcap)``;
            0 where they stay as they are.
    """

    query: Value
    key: Value
    value: Value
    heads: tuple[int, int, int]
    scale: float
    keys: Cache
    values: Cache
    visible: tuple[Array, ...]
    softcap: float = 0.0


@dataclass(frozen=True)
class Recent:
    """A state that is no cache, as a call takes and leaves it: recent tokens, or a memory.

    Attributes:
        read: the name of the state that the call begins with: of the last few tokens' inputs of a
            convolution, of the token before, of a recurrence's memory.
        written: the name of the state that gets what the call leaves.
        ignored: for each probe, whether the call takes zeros in place of what the state holds:
            it must at position 0 and nowhere else. None where the file does not say.
    """

    read: str
    written: str
    ignored: tuple[bool, ...] | None


@dataclass(frozen=True, eq=False)
class ShortConv(Value):
    """A causal convolution of each column over the last few tokens (``edgeforge::short_conv``).

    Attributes:
        source: what is convolved, the product of a gate and a value.
        weight: the weight.
        values: its values, ``float32[n, w]``; the last column multiplies the token itself.
        recent: the state, named as caches are: ``3.recent`` for layer 3 where states have names.
    """

    source: Value
    weight: StoredWeight
    values: Array
    recent: Recent


@dataclass(frozen=True, eq=False)
class Sigmoid(Value):
    """``1 / (1 + exp(-x))``."""

    source: Value


@dataclass(frozen=True, eq=False)
class Unknown(Value):
    """What a reader does not recognise as one of the others.

    Attributes:
        kind: the operation.
        operands: what it was given.
    """

    kind: str
    operands: tuple[Value, ...] = ()


@dataclass(frozen=True, eq=False)
class Numbers(Value):
    """Whole numbers, or a mask made of them: an array for each probe."""

    arrays: tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Constant(Value):
    """An array that the file holds and that is no weight."""

    array: Array


@dataclass(frozen=True)
class EntryPoint:
    """One graph, function or method.

    Attributes:
        name: as the file calls it.
        logits: what it returns.
        probes: the calls for which numbers were computed.
        outside: operators that are not of the expected delegate, kind or precision, in words.
    """

    name: str
    logits: Value
    probes: tuple[Probe, ...]
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What an artifact's files say.

    Attributes:
        entry_points: every entry point that computes logits.
        integers: how products with integers take activations that the plan does not round.
        halves: how products with float16 weights take them.
        floats: how products with weights of other float dtypes take them.
        context: the declared context, by the place that states it.
        cache_multiple: what caches' lengths are rounded up to a multiple of.
        ids: the token ids that the files state, by name (``bos``, ``eos``, ``pad``).
        unread: what cannot be read on this target, one clause each.
    """

    entry_points: tuple[EntryPoint, ...]
    integers: Precision = "int8"
    halves: Precision = "float32"
    floats: Precision = "float32"
    context: Mapping[str, int] = field(default_factory=dict)
    cache_multiple: int = 1
    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def at(value: Value, probe: int) -> Array:
    """The array of a `Constant` or of `Numbers` for a probe, by its index."""
    if isinstance(value, Constant):
        return value.array
    assert isinstance(value, Numbers)
    return value.arrays[probe]


def are_numbers(values: tuple[Value, ...]) -> bool:
    """Whether all are numbers that can be computed with."""
    return all(isinstance(value, Constant | Numbers) for value in values)


def row_numbers(value: Value, probes: int) -> tuple[tuple[int, ...], ...]:
    """Numbers as flat tuples, one for each probe."""
    return tuple(tuple(map(int, at(value, i).ravel())) for i in range(probes))
