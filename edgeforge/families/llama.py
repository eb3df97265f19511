"""Llama 2, 3, 3.1, 3.2 and whatever else loads as ``llama`` (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader, token_ids
from edgeforge.errors import CheckpointError
from edgeforge.families.activation import read_activation
from edgeforge.families.assembly import assemble, norm
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.rotary import read_rope, scaled_context
from edgeforge.families.spec import LayerSpec, ModelSpec, RopeSpec, WeightSpec

LayerWeights = Callable[..., dict[str, WeightSpec]]


@dataclass(frozen=True)
class Conventions:
    """How a descendant of Llama differs from it, and its defaults for fields that a file lacks.

    Attributes:
        model_type: the family's name.
        window: attention window in tokens, 0 for none.
        norm_eps: default of ``eps_field``.
        eps_field: the field of the norms' epsilon; empty where the family has none, and
            ``norm_eps`` is its constant.
        norm_added: what norms add to their weight before they multiply by it.
        max_context: default of ``max_position_embeddings``, tokens.
        kv_heads: default of ``num_key_value_heads``; 0 for as many as query heads.
        head_dim: default of ``head_dim``; 0 for the hidden size over the query heads.
        heads: default of ``num_attention_heads``; 0 where the file must have it.
        tied: default of ``tie_word_embeddings``.
        activation_field: the field that names the activation function.
        activation: that field's default.
        theta: default of ``rope_theta``.
        original_context: longrope's original context where the file has none beside its section,
            tokens; 0 for the section's, or the model's own context.
        partial_rotary: whether the family may rotate only the first columns of each head.
        rotary_share: the share of rotated columns where the file has none.
        growing: whether queries may grow with the position.
        magnitudes: whether longrope's section states the multiplier of cosine and sine.
        ropes: the rotary embeddings, where the family reads them itself.
        feed_forward: returns a layer with the dimensions of its feed-forward part, by its number;
            None where each has ``intermediate_size`` columns.
        layer_weights: returns a layer's weights; None for `separate_projections`.
        final_norm: the last norm's weights, by ``weight`` and ``bias``; None for one without bias.
        head_bias: the checkpoint's name of the head's bias, None where it has none.
    """

    model_type: str
    window: int = 0
    norm_eps: float = 1e-6
    eps_field: str = "rms_norm_eps"
    norm_added: float = 0.0
    max_context: int = 2048
    kv_heads: int = 0
    head_dim: int = 0
    heads: int = 0
    tied: bool = False
    activation_field: str = "hidden_act"
    activation: str = "silu"
    theta: float = 10000.0
    original_context: int = 0
    partial_rotary: bool = False
    rotary_share: float = 1.0
    growing: bool = False
    magnitudes: bool = False
    ropes: tuple[RopeSpec, ...] = ()
    feed_forward: Callable[[int, LayerSpec], LayerSpec] | None = None
    layer_weights: LayerWeights | None = None
    final_norm: Mapping[str, WeightSpec] | None = None
    head_bias: str | None = None


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Llama configuration (transformers' ``LlamaConfig`` fields)."""
    config.absent("rope_interleaved")
    weights = partial(
        separate_projections, biased=read_biases(config, "attention_bias", "mlp_bias")
    )
    return read_llama_like(config, generation, Conventions("llama", layer_weights=weights))


def read_llama_like(
    config: ConfigReader, generation: Mapping[str, object], family: Conventions
) -> ModelSpec:
    """Reads the fields that all descendants of Llama share, and maps the weights.

    Args:
        config: the reader of ``config.json``.
        generation: ``generation_config.json``, or an empty mapping.
        family: the family's differences and defaults.

    Raises:
        CheckpointError: a field is missing, wrong or not implemented.
    """
    hidden, heads, kv_heads, head_dim = read_head_counts(
        config, family.kv_heads, family.head_dim, family.heads
    )
    layer = LayerSpec(heads, kv_heads, config.integer("intermediate_size"), family.window)
    layers = (layer,) * config.layer_count("num_hidden_layers")
    if family.feed_forward is not None:
        layers = tuple(family.feed_forward(index, each) for index, each in enumerate(layers))
    vocab = config.integer("vocab_size")
    tied = config.flag("tie_word_embeddings", family.tied)
    max_context = config.integer("max_position_embeddings", family.max_context)
    ropes = family.ropes or (
        read_rope(
            config,
            head_dim,
            max_context,
            theta=family.theta,
            share=family.rotary_share,
            original_context=family.original_context,
            partial=family.partial_rotary,
            growing=family.growing,
            magnitudes=family.magnitudes,
        ),
    )
    fields = config.raw()
    eps = config.real(family.eps_field, family.norm_eps) if family.eps_field else family.norm_eps
    last = {"weight": norm("model.norm.weight", hidden, added=family.norm_added)}

    return ModelSpec(
        model_type=family.model_type,
        hidden_size=hidden,
        head_dim=head_dim,
        vocab_size=vocab,
        layers=layers,
        norm_eps=eps,
        ropes=ropes,
        tied=tied,
        max_context=scaled_context(ropes[0], max_context),
        bos=next(iter(token_ids(fields, generation, "bos_token_id", vocab)), None),
        eos=token_ids(fields, generation, "eos_token_id", vocab),
        pad=next(iter(token_ids(fields, generation, "pad_token_id", vocab)), None),
        activation=read_activation(config, family.activation_field, family.activation),
        weights=assemble(
            hidden_size=hidden,
            vocab_size=vocab,
            layers=layers,
            layer_weights=partial(
                family.layer_weights or separate_projections, hidden=hidden, head_dim=head_dim
            ),
            embedding="model.embed_tokens.weight",
            final_norm=last if family.final_norm is None else family.final_norm,
            head=None if tied else "lm_head.weight",
            head_bias=family.head_bias,
        ),
        ignored=("*.rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())),
    )


def read_head_counts(
    config: ConfigReader, absent_kv_heads: int = 0, absent_head_dim: int = 0, absent_heads: int = 0
) -> tuple[int, int, int, int]:
    """Returns hidden size, query heads, key/value heads and head width.

    Args:
        config: the reader of ``config.json``.
        absent_kv_heads: key/value heads where the file has no such field, 0 for as many as query
            heads; null in the file always means as many as query heads.
        absent_head_dim: head width where the file has none, 0 for the hidden size over the heads.
        absent_heads: query heads where the file has none, 0 where it must have them.

    Raises:
        CheckpointError: query heads are not a multiple of key/value heads, or the file has no
            ``head_dim`` and the hidden size is not a multiple of query heads.
    """
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", absent_heads or None)
    named = "num_key_value_heads" in config.fields()
    kv_heads = config.integer("num_key_value_heads", heads if named else absent_kv_heads or heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if config.get("head_dim") is None and not absent_head_dim and hidden % heads:
        raise CheckpointError(
            f"{config.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    width = absent_head_dim or hidden // heads
    return hidden, heads, kv_heads, config.integer("head_dim", width)
