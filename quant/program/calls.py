"""Typed views of a program's calls: only this file knows the position of each argument.

Both dialect checks guarantee what these views assume: positional arguments with the types of the
operators' schemas in `quant.program.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import fx

from quant.formats.formats import IntFormat, QuantizedFormat
from quant.program.ops import quantized_format
from quant.program.program import node_argument, shape_of


@dataclass(frozen=True)
class AttentionCall:
    """``edgeforge::attention(q, k, v, k_cache, v_cache, position, window, scale, softcap)``.

    Attributes:
        q: queries, ``float[1, t, heads, dim]``.
        k: new keys, ``float[1, t, kv_heads, dim]``.
        v: new values, ``float[1, t, kv_heads, dim]``.
        key_cache: ``float[1, kv_heads, context, dim]``.
        value_cache: ``float[1, kv_heads, context, dim]``.
        window: number of tokens that a token attends to, itself included; 0 for itself and all
            tokens before it.
        scale: factor on the scores.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)``; 0 leaves them as they are.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    key_cache: fx.Node
    value_cache: fx.Node
    window: int
    scale: float
    softcap: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::attention``."""
        q, k, v, key_cache, value_cache = (node_argument(node, index) for index in range(5))
        window, scale, softcap = node.args[6:9]
        assert isinstance(window, int) and isinstance(scale, float) and isinstance(softcap, float)
        return cls(q, k, v, key_cache, value_cache, window, scale, softcap)


@dataclass(frozen=True)
class QuantizedCall:
    """``edgeforge::quant_linear`` or ``quant_embedding``: ``(source, codes, scale, zero, format)``.

    Attributes:
        source: the product's activations, or the embedding's tokens.
        codes: ``uint8[rows, bytes]``.
        scale: the scales, or the tables of a palette format.
        zero_point: the zero points; None for symmetric formats and palettes.
        format: the weight's format.
    """

    source: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    format: QuantizedFormat

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls one of the two operators."""
        source, codes, scale = (node_argument(node, index) for index in range(3))
        zero_point = None if node.args[3] is None else node_argument(node, 3)
        return cls(source, codes, scale, zero_point, quantized_format(str(node.args[4])))

    @property
    def integers(self) -> IntFormat:
        """The integer format; only for targets that refuse palettes before."""
        assert isinstance(self.format, IntFormat)
        return self.format

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's rows and columns."""
        rows, stored = shape_of(self.codes)
        return rows, stored * 8 // self.format.bits


@dataclass(frozen=True)
class NormCall:
    """``edgeforge::rms_norm(x, weight, eps)``.

    Attributes:
        x: ``float[..., n]``.
        weight: ``float[n]``.
        epsilon: added to the mean square.
    """

    x: fx.Node
    weight: fx.Node
    epsilon: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::rms_norm``."""
        epsilon = node.args[2]
        assert isinstance(epsilon, float)
        return cls(node_argument(node, 0), node_argument(node, 1), epsilon)


@dataclass(frozen=True)
class LayerNormCall:
    """``edgeforge::layer_norm(x, weight, bias, eps)``.

    Attributes:
        x: ``float[..., n]``.
        weight: ``float[n]``; None where the norm has no scale.
        bias: ``float[n]``; None where it has none.
        epsilon: added to the variance.
    """

    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    epsilon: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::layer_norm``."""
        weight, bias, epsilon = node.args[1:4]
        assert weight is None or isinstance(weight, fx.Node)
        assert bias is None or isinstance(bias, fx.Node)
        assert isinstance(epsilon, float)
        return cls(node_argument(node, 0), weight, bias, epsilon)


@dataclass(frozen=True)
class ShortConvCall:
    """``edgeforge::short_conv(x, weight, recent, position)``.

    Attributes:
        x: ``float[1, t, n]``.
        weight: ``float[n, w]``; the last column multiplies the token itself.
        recent: the state, ``float[1, n, w - 1]``.
    """

    x: fx.Node
    weight: fx.Node
    recent: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::short_conv``."""
        return cls(*(node_argument(node, index) for index in range(3)))


@dataclass(frozen=True)
class FactorCall:
    """``scale(x, factor)``, ``softcap(x, cap)``, ``clamp(x, limit)`` or ``l2_norm(x, eps)``.

    Attributes:
        x: ``float[...]``.
        number: the factor, the cap, the limit or the epsilon.
    """

    x: fx.Node
    number: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls one of the four operators."""
        number = node.args[1]
        assert isinstance(number, float)
        return cls(node_argument(node, 0), number)


@dataclass(frozen=True)
class SplitCall:
    """``aten::split_with_sizes(x, sizes, -1)``.

    Attributes:
        x: ``float[..., n]``.
        sizes: the parts' sizes along the last dimension.
    """

    x: fx.Node
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that splits."""
        sizes = node.args[1]
        assert isinstance(sizes, list | tuple)
        return cls(node_argument(node, 0), tuple(int(str(size)) for size in sizes))


@dataclass(frozen=True)
class GetCall:
    """``getitem(split, index)``: one part of a split.

    Attributes:
        split: the node that splits.
        index: the part's index.
    """

    split: fx.Node
    index: int

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that takes a part."""
        index = node.args[1]
        assert isinstance(index, int)
        return cls(node_argument(node, 0), index)


@dataclass(frozen=True)
class RouteCall:
    """``edgeforge::route(logits, chosen, normalized)``.

    Attributes:
        logits: ``float[b, t, E]``.
        chosen: how many experts a token has.
        normalized: whether the kept weights are divided by their sum.
    """

    logits: fx.Node
    chosen: int
    normalized: bool

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::route``."""
        chosen, normalized = node.args[1:3]
        assert isinstance(chosen, int) and isinstance(normalized, bool)
        return cls(node_argument(node, 0), chosen, normalized)


@dataclass(frozen=True)
class SparseMixerCall:
    """``edgeforge::route_sparse_mixer(logits, jitter)``.

    Attributes:
        logits: ``float[b, t, E]``.
        jitter: half of the largest relative distance.
    """

    logits: fx.Node
    jitter: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::route_sparse_mixer``."""
        jitter = node.args[1]
        assert isinstance(jitter, float)
        return cls(node_argument(node, 0), jitter)


@dataclass(frozen=True)
class RecurrenceCall:
    """``edgeforge::recurrence(query, key, value, log_decay, bonus, beta, memory, position)``.

    Attributes:
        query: ``float[1, t, g, n]``.
        key: ``float[1, t, g, n]``.
        value: ``float[1, t, h, p]``.
        log_decay: ``float[1, t, h]``, ``float[1, t, h, n]``, or a weight ``float[h, n]``.
        bonus: a weight ``float[h, n]``; None where a token is read after it was added.
        beta: ``float[1, t, h]``; None where values are added and replace nothing.
        memory: the state, ``float[1, h, n, p]``.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    log_decay: fx.Node
    bonus: fx.Node | None
    beta: fx.Node | None
    memory: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::recurrence``."""
        query, key, value, decay = (node_argument(node, index) for index in range(4))
        bonus, beta = (None if node.args[i] is None else node_argument(node, i) for i in (4, 5))
        return cls(query, key, value, decay, bonus, beta, node_argument(node, 6))

    @property
    def constant_decay(self) -> bool:
        """Whether the decay is a weight, the same for all tokens."""
        return len(shape_of(self.log_decay)) == 2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Heads of the memory, heads of queries and keys, and the memory's rows and columns."""
        _, heads, rows, columns = shape_of(self.memory)
        return heads, shape_of(self.query)[2], rows, columns


@dataclass(frozen=True)
class TokenShiftCall:
    """``edgeforge::token_shift(x, recent, position)``.

    Attributes:
        x: ``float[1, t, n]``.
        recent: the state, ``float[1, n, 1]``.
    """

    x: fx.Node
    recent: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::token_shift``."""
        return cls(node_argument(node, 0), node_argument(node, 1))


@dataclass(frozen=True)
class GainCall:
    """``edgeforge::gain(x, weight)``.

    Attributes:
        x: ``float[1, t, n]`` or ``float[1, t, h, n]``.
        weight: ``float[n]``, or ``float[h, 1]``.
    """

    x: fx.Node
    weight: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The view of a node that calls ``edgeforge::gain``."""
        return cls(node_argument(node, 0), node_argument(node, 1))
