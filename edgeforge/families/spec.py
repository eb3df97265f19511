"""`ModelSpec`: every dimension of a decoder, and the checkpoint tensors of each of its weights."""

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
        scaling: the rule that changes the frequencies; each field below names the rules that use
            it.
        factor: ``linear`` and ``llama3``: divisor of the frequencies.
        low_freq_factor: ``llama3``: wavelengths over ``original_context / low_freq_factor`` are
            stretched by the full ``factor``.
        high_freq_factor: ``llama3``: wavelengths under ``original_context / high_freq_factor`` are
            not changed.
        original_context: ``llama3`` and ``longrope``: context before it was extended, tokens.
        short_factor: ``longrope``: one divisor per frequency, for a declared context of at most
            ``original_context``.
        long_factor: ``longrope``: one divisor per frequency, for a longer declared context.
        attention_factor: ``longrope``: multiplier of both cosine and sine.
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
    """Rows of one checkpoint tensor: all of them, or those of one part where it stacks several.

    Attributes:
        tensor: the tensor's name.
        shape: the piece's own ``(rows, columns)`` or ``(rows,)``.
        first: the tensor's row with which the piece begins.
        rows_of_tensor: rows of the whole tensor; None where the piece is all of it.
    """

    tensor: str
    shape: tuple[int, ...]
    first: int = 0
    rows_of_tensor: int | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        rows = self.shape[0] if self.rows_of_tensor is None else self.rows_of_tensor
        return (rows, *self.shape[1:])


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the program: pieces of the checkpoint stacked along axis 0.

    Attributes:
        shape: ``(out, in)`` for a matrix, ``(n,)`` for a norm.
        pieces: the tensors to stack, in order; their rows add up to ``shape[0]``. Empty for a
            matrix that only a rotation adds (`edgeforge.model.rotated_weights`).
        role: the weight's role; recipes choose formats by it.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    role: Literal["embedding", "linear", "head", "norm"]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the decoder and its exporters need from a checkpoint's configuration.

    Attributes:
        model_type: the checkpoint's ``model_type``, a key of `edgeforge.families.registry`.
        hidden_size: width of the residual stream.
        head_dim: width of one attention head.
        vocab_size: rows of the embedding.
        layers: dimensions layer by layer.
        norm_eps: epsilon of every RMSNorm.
        rope: the rotary embedding.
        qk_norm: whether each head of q and k is RMS-normalised before the rotary embedding.
        window: attention window in tokens, 0 when there is none.
        tied: whether the head is the embedding transposed.
        norm_matrix: whether a matrix replaces the last norm's scale, as in a rotated model whose
            head stays tied (`edgeforge.model.rotated_weights`).
        max_context: the longest context that the checkpoint was made for, tokens.
        bos: token that begins a text, if any.
        eos: tokens that end a text.
        pad: padding token, if any.
        weights: the shape and checkpoint tensors of each weight, by program weight name.
        ignored: names of checkpoint tensors that are not needed (shell patterns).
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
        """Number of parameters in the checkpoint; a tensor that two weights read counts once."""
        pieces = {piece for weight in self.weights.values() for piece in weight.pieces}
        return sum(math.prod(piece.shape) for piece in pieces)

    def summary(self) -> dict[str, object]:
        """Returns the spec as a manifest stores it in JSON, without the map of weights."""
        fields = asdict(self)
        del fields["weights"], fields["ignored"]
        fields["num_parameters"] = self.num_parameters
        return fields
