"""`ModelSpec`: every dimension of a decoder, and where each of its weights lies in a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

RopeScaling = Literal["default", "linear", "llama3", "longrope"]


@dataclass(frozen=True)
class RopeSpec:
    """A rotary embedding: one frequency per pair of columns.

    Attributes:
        theta: base of the geometric series of frequencies.
        width: how many columns of each head are rotated (even, at most the head width).
        scaling: which rule changes the frequencies; the fields below belong to it.
        factor: ``linear`` and ``llama3``: positions are stretched by this.
        low_freq_factor: ``llama3``: wavelengths over original / this are fully stretched.
        high_freq_factor: ``llama3``: wavelengths under original / this are left alone.
        original_context: ``llama3`` and ``longrope``: context before it was extended, tokens.
        short_factor: ``longrope``: one divisor per frequency, up to the original context.
        long_factor: ``longrope``: likewise, past it.
        attention_factor: ``longrope``: cosine and sine are both multiplied by this.
    """

    theta: float
    width: int
    scaling: RopeScaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """Dimensions of one decoder layer: head counts, and the width of the feed-forward part."""

    num_heads: int
    num_kv_heads: int
    ffn_width: int


@dataclass(frozen=True)
class Piece:
    """Rows of a checkpoint tensor: all of them, as ``(rows, columns)`` or ``(rows,)``."""

    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the program: pieces of the checkpoint stacked along axis 0.

    Attributes:
        shape: ``(out, in)`` of a matrix, ``(n,)`` of a norm.
        pieces: what is stacked, in order; their rows add up to ``shape[0]``. None of a matrix that
            only a rotation brings (`edgeforge.model.rotated_weights`).
        role: what the weight does, by which recipes choose formats.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    role: Literal["embedding", "linear", "head", "norm"]


@dataclass(frozen=True)
class ModelSpec:
    """Everything the decoder and its exporters need to know of a checkpoint's configuration.

    Attributes:
        model_type: the checkpoint's, the key of `edgeforge.families.registry`.
        hidden_size: width of the residual stream.
        head_dim: width of one attention head.
        vocab_size: rows of the embedding.
        layers: dimensions layer by layer.
        norm_eps: epsilon of every RMSNorm.
        rope: the rotary embedding.
        qk_norm: whether each head of q and k is RMS-normalised before the rotary embedding.
        window: attention window in tokens, 0 when there is none.
        tied: whether the head is the embedding transposed.
        norm_matrix: whether a matrix takes the place of the last norm's scale: in a rotated
            model whose head stays tied (`edgeforge.model.rotated_weights`).
        max_context: positions the checkpoint was made for, tokens.
        bos: token that begins a text, if any.
        eos: tokens that end one.
        pad: padding token, if any.
        weights: program weight name to its place in the checkpoint.
        ignored: checkpoint tensors that are known and not needed (shell patterns).
    """

    model_type: str
    hidden_size: int
    head_dim: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    rope: RopeSpec
    qk_norm: bool
    window: int
    tied: bool
    max_context: int
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    weights: dict[str, WeightSpec]
    ignored: tuple[str, ...] = ()
    norm_matrix: bool = False

    @property
    def num_parameters(self) -> int:
        """Number of the checkpoint's own weights: a tensor that two weights read counts once."""
        pieces = {piece for weight in self.weights.values() for piece in weight.pieces}
        return sum(math.prod(piece.shape) for piece in pieces)

    def summary(self) -> dict[str, object]:
        """The spec as JSON holds it in a manifest, without the map of weights."""
        fields = asdict(self)
        del fields["weights"], fields["ignored"]
        fields["num_parameters"] = self.num_parameters
        return fields
