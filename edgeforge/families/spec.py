"""`ModelSpec`: every dimension of a decoder, and the checkpoint tensors of each of its weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

RopeScaling = Literal["default", "linear", "llama3", "longrope", "yarn"]
Role = Literal["embedding", "linear", "head", "norm", "bias", "conv", "router", "gain", "gate"]
Form = Literal["plain", "complement", "negative_exponential"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Block = Literal["pre", "sandwich", "post", "parallel"]
Mixer = Literal["attention", "short_conv", "time_mix", "mamba", "delta_net"]
FeedForwardKind = Literal["mlp", "channel_mix"]
Router = Literal["softmax", "normalized_softmax", "sparse_mixer"]


@dataclass(frozen=True)
class RopeSpec:
    """A rotary embedding: one frequency per pair of columns.

    Attributes:
        theta: base of the geometric series of frequencies.
        width: how many columns of each head are rotated (even, at most the head width).
        scaling: the rule that changes the frequencies; each field below names the rules that use
            it.
        factor: ``linear``, ``llama3`` and ``yarn``: divisor of the frequencies.
        low_freq_factor: ``llama3``: wavelengths over ``original_context / low_freq_factor`` are
            stretched by the full ``factor``.
        high_freq_factor: ``llama3``: wavelengths under ``original_context / high_freq_factor`` are
            not changed.
        original_context: ``llama3``, ``longrope`` and ``yarn``: context before it was extended,
            tokens.
        short_factor: ``longrope``: one divisor per frequency, for a declared context of at most
            ``original_context``.
        long_factor: ``longrope``: one divisor per frequency, for a longer declared context.
        attention_factor: ``longrope`` and ``yarn``: multiplier of both cosine and sine.
        beta_fast: ``yarn``: frequencies of more turns in the original context are not changed.
        beta_slow: ``yarn``: frequencies of fewer turns are divided by the full ``factor``.
        truncate: ``yarn``: whether the bounds of the two are whole pairs of columns.
        growth: how queries grow with the position p: cosine and sine are multiplied by
            ``1 + growth * log(1 + floor(p / original_context))``; 0 for none.
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
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    growth: float = 0.0


@dataclass(frozen=True)
class RecurrenceSpec:
    """Dimensions of a layer's recurrence (`quant.program.recurrence_ops.recurrence`).

    Attributes:
        heads: heads of values, and so of the memory.
        key_heads: heads of queries and keys, which divide ``heads``.
        key_width: width of a head's query and key, the memory's rows.
        value_width: width of a head's value, the memory's columns.
        dynamic: whether decay and mixes are made of each token, as RWKV 6 has it and RWKV 5 not.
    """

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    dynamic: bool = True

    @property
    def memory(self) -> int:
        """Numbers that the memory holds."""
        return self.heads * self.key_width * self.value_width


@dataclass(frozen=True)
class LayerSpec:
    """Dimensions of one decoder layer.

    Attributes:
        num_heads: query heads; 0 where the mixer is no attention.
        num_kv_heads: key/value heads; 0 where the mixer is no attention.
        ffn_width: width of the feed-forward part.
        window: attention window in tokens, 0 when there is none.
        rope: the index in `ModelSpec.ropes` of the layer's rotary embedding; None for no rotation.
        query_rope: the index of the queries' own, where theirs differs from the keys' (tables
            that grow with the position); None for the same as ``rope``.
        mixer: what mixes tokens: attention over cached keys and values, a short convolution, or a
            recurrence: RWKV's time mix, Mamba 2, or a gated delta net.
        experts: how many experts the feed-forward part has, each of the width ``ffn_width``; 0
            where it is dense.
        chosen_experts: how many of them each token has; 0 where it is dense.
        shared_width: width of the expert that every token has beside those that it chose; 0 for
            none.
        recurrence: the recurrence's dimensions, where the mixer is one.
        feed_forward: what follows the mixer: a dense part or a mixture, or RWKV's channel mix,
            which also sees the token before.
        attention_experts: how many experts attention has, each with queries and an output of its
            own (`edgeforge.model.attention_mixture`); 0 for none. Keys and values are one for all.
        chosen_attention_experts: how many of them each token has. ``num_heads`` counts the query
            heads of these; of one expert there are as many as key/value heads.
    """

    num_heads: int
    num_kv_heads: int
    ffn_width: int
    window: int = 0
    rope: int | None = 0
    query_rope: int | None = None
    mixer: Mixer = "attention"
    experts: int = 0
    chosen_experts: int = 0
    shared_width: int = 0
    recurrence: RecurrenceSpec | None = None
    feed_forward: FeedForwardKind = "mlp"
    attention_experts: int = 0
    chosen_attention_experts: int = 0


@dataclass(frozen=True)
class Piece:
    """Rows of one checkpoint tensor: all of them, or those of one part where it stacks several.

    A tensor of three axes, ``[matrices, rows, columns]``, counts as the matrices' rows one after
    the other.

    Attributes:
        tensor: the tensor's name.
        shape: the piece's own ``(rows, columns)`` or ``(rows,)``.
        first: the tensor's row with which the piece begins.
        rows_of_tensor: rows of the whole tensor; None where the piece is all of it.
        matrices: how many matrices the tensor stacks along an axis of its own; 0 for no such axis.
    """

    tensor: str
    shape: tuple[int, ...]
    first: int = 0
    rows_of_tensor: int | None = None
    matrices: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        rows = self.shape[0] if self.rows_of_tensor is None else self.rows_of_tensor
        if self.matrices:
            return (self.matrices, rows // self.matrices, *self.shape[1:])
        return (rows, *self.shape[1:])


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the program: pieces of the checkpoint stacked along axis 0.

    Attributes:
        shape: ``(out, in)`` for a matrix, ``(n,)`` for a norm or a bias, ``(n, w)`` for a
            convolution, whose checkpoint tensor is ``(n, 1, w)``, ``(n,)``, ``(h, 1)`` or
            ``(h, n)`` for factors and numbers of a recurrence.
        pieces: the tensors to stack, in order; their rows add up to ``shape[0]``. Empty for a
            matrix that only a rotation adds (`edgeforge.model.rotated_weights`).
        role: the weight's role; recipes choose formats by it. Norms, biases, convolutions,
            routers, factors (``gain``) and the products of a recurrence's decays and mixes
            (``gate``) stay float.
        added: a number that is added to every value of a vector when it is read: 1 for norms that
            multiply by one plus their weight.
        form: how values are made of the checkpoint's ``w`` when they are read: ``1 - w``
            (``complement``), or ``-exp(w)`` (``negative_exponential``), in float32.
        transposed: whether the checkpoint holds the matrix with rows and columns exchanged; it is
            then one piece, whose shape is that of the checkpoint's tensor.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    role: Role
    added: float = 0.0
    form: Form = "plain"
    transposed: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the decoder and its exporters need from a checkpoint's configuration.

    What ``weights`` lacks the decoder leaves out: biases, norms of queries and keys, and the scales
    and shifts of norms are there where the map names them.

    Attributes:
        model_type: the checkpoint's ``model_type``, a key of `edgeforge.families.registry`.
        hidden_size: width of the residual stream.
        head_dim: width of one attention head; of one head of the recurrence where no layer attends.
        vocab_size: rows of the embedding.
        layers: dimensions layer by layer.
        norm_eps: epsilon of every norm.
        ropes: the rotary embeddings; layers name theirs by index. The first is that of layers that
            see the whole context. Empty where no layer rotates.
        tied: whether the head is the embedding transposed.
        max_context: the longest context that the checkpoint was made for, tokens. A model without
            attention takes longer ones too, for its states do not grow.
        bos: token that begins a text, if any.
        eos: tokens that end a text.
        pad: padding token, if any.
        weights: the shape and checkpoint tensors of each weight, by program weight name.
        ignored: names of checkpoint tensors that are not needed (shell patterns).
        norm_matrix: whether a matrix replaces the last norm's scale, as in a rotated model whose
            head stays tied (`edgeforge.model.rotated_weights`).
        norm: RMSNorm, or LayerNorm, which also subtracts the mean. Queries and keys are always
            RMS-normalised, if at all: each head where the norm is as wide as a head, else all
            heads together.
        block: where norms and sums stand in a layer: ``pre`` is ``x + f(norm(x))`` for the mixer
            and then for the feed-forward part; ``sandwich`` is ``x + norm(f(norm(x)))``; ``post``
            is ``x + norm(f(x))``; ``parallel`` adds both parts of one norm to ``x``.
        activation: the activation function of the feed-forward part.
        gated: whether a feed-forward part is ``down(act(gate) * up)``, else ``down(act(up))``.
        attention_scale: factor on attention's scores; None for ``head_dim ** -0.5``.
        attention_softcap: bound on attention's scores by a tanh; 0 for none.
        logit_softcap: bound on the logits by a tanh; 0 for none.
        clip_qkv: largest magnitude of queries, keys and values, after norms over all heads and
            before norms of single heads; 0 for no bound.
        embedding_multiplier: factor on the embedding's rows.
        residual_multiplier: factor on what a layer's parts add to the residual stream.
        logit_multiplier: factor on the logits.
        conv_width: tokens that a short convolution reads, the token itself among them.
        router: how a mixture's tokens choose experts (`quant.program.expert_ops`): by a softmax
            whose kept shares stay as they are or are normalised, or by SparseMixer's rule.
        router_jitter: SparseMixer's half of the largest relative distance.
    """

    model_type: str
    hidden_size: int
    head_dim: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    ropes: tuple[RopeSpec, ...]
    tied: bool
    max_context: int
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    weights: dict[str, WeightSpec]
    ignored: tuple[str, ...] = ()
    norm_matrix: bool = False
    norm: Literal["rms", "layer"] = "rms"
    block: Block = "pre"
    activation: Activation = "silu"
    gated: bool = True
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    clip_qkv: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    conv_width: int = 0
    router: Router = "softmax"
    router_jitter: float = 0.0

    @property
    def rope(self) -> RopeSpec | None:
        """The rotary embedding of layers that see the whole context; None where there is none."""
        return self.ropes[0] if self.ropes else None

    @property
    def attends(self) -> bool:
        """Whether some layer attends to all earlier tokens, whose keys and values it then keeps."""
        return any(layer.mixer == "attention" for layer in self.layers)

    @property
    def window(self) -> int:
        """The window that every attention has, tokens; 0 where a layer sees the whole context."""
        windows = {layer.window for layer in self.layers if layer.mixer == "attention"}
        return max(windows) if windows and 0 not in windows else 0

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return any(name.endswith(".self_attn.q_norm.weight") for name in self.weights)

    @property
    def scale(self) -> float:
        """The factor on attention's scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def can_rewind(self) -> bool:
        """Whether a text's last tokens can be taken back by a smaller position alone."""
        return all(layer.mixer == "attention" for layer in self.layers)

    @property
    def mixture(self) -> bool:
        """Whether some layer's feed-forward part or attention is a mixture of experts."""
        return any(layer.experts or layer.attention_experts for layer in self.layers)

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


def convolved_columns(spec: ModelSpec, layer: LayerSpec) -> int:
    """Returns the columns of a layer's short convolution; 0 where it has none.

    A gated short convolution has the residual stream's width. Before a recurrence stand queries,
    keys and values side by side.
    """
    made = layer.recurrence
    if layer.mixer == "short_conv":
        return spec.hidden_size
    if layer.mixer in ("mamba", "delta_net") and made is not None:
        return 2 * made.key_heads * made.key_width + made.heads * made.value_width
    return 0
