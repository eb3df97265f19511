"""Llama 2, 3, 3.1, 3.2 and whatever else loads as ``llama`` (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader, token_ids
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import assemble, matrix, norm
from edgeforge.families.rotary import read_rope, scaled_context
from edgeforge.families.spec import LayerSpec, ModelSpec, WeightSpec

LayerWeights = Callable[..., dict[str, WeightSpec]]


@dataclass(frozen=True)
class Conventions:
    """How a descendant of Llama differs from it, and its defaults for fields that a file lacks.

    Attributes:
        model_type: the family's name.
        window: attention window in tokens, 0 for none.
        norm_eps: default of ``rms_norm_eps``.
        max_context: default of ``max_position_embeddings``, tokens.
        kv_heads: default of ``num_key_value_heads``; 0 for as many as query heads.
        original_context: longrope's original context where the file has none beside its section,
            tokens; 0 for the section's, or the model's own context.
        partial_rotary: whether the family may rotate only the first columns of each head.
        layer_weights: returns a layer's weights; None for `separate_projections`.
    """

    model_type: str
    window: int = 0
    norm_eps: float = 1e-6
    max_context: int = 2048
    kv_heads: int = 0
    original_context: int = 0
    partial_rotary: bool = False
    layer_weights: LayerWeights | None = None


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Llama configuration (transformers' ``LlamaConfig`` fields)."""
    config.absent("attention_bias", "mlp_bias", "rope_interleaved")
    return read_llama_like(config, generation, Conventions("llama"))


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
    hidden, heads, kv_heads, head_dim = read_head_counts(config, family.kv_heads)
    config.choice("hidden_act", ("silu", "swish"), "silu")
    layer = LayerSpec(heads, kv_heads, config.integer("intermediate_size"), family.window)
    layers = (layer,) * config.layer_count("num_hidden_layers")
    vocab = config.integer("vocab_size")
    tied = config.flag("tie_word_embeddings", False)
    max_context = config.integer("max_position_embeddings", family.max_context)
    rope = read_rope(
        config,
        head_dim,
        max_context,
        original_context=family.original_context,
        partial=family.partial_rotary,
    )
    fields = config.raw()

    return ModelSpec(
        model_type=family.model_type,
        hidden_size=hidden,
        head_dim=head_dim,
        vocab_size=vocab,
        layers=layers,
        norm_eps=config.real("rms_norm_eps", family.norm_eps),
        ropes=(rope,),
        tied=tied,
        max_context=scaled_context(rope, max_context),
        bos=next(iter(token_ids(fields, generation, "bos_token_id", vocab)), None),
        eos=token_ids(fields, generation, "eos_token_id", vocab),
        pad=next(iter(token_ids(fields, generation, "pad_token_id", vocab)), None),
        weights=assemble(
            hidden_size=hidden,
            vocab_size=vocab,
            layers=layers,
            layer_weights=partial(
                family.layer_weights or separate_projections, hidden=hidden, head_dim=head_dim
            ),
            embedding="model.embed_tokens.weight",
            final_norm={"weight": norm("model.norm.weight", hidden)},
            head=None if tied else "lm_head.weight",
        ),
        ignored=("*.rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())),
    )


def separate_projections(
    index: int, layer: LayerSpec, *, hidden: int, head_dim: int
) -> dict[str, WeightSpec]:
    """Returns one layer's weights, for a checkpoint with separate q, k, v, gate and up tensors."""
    at = f"model.layers.{index}."
    q, kv = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
    attn, mlp = at + "self_attn.", at + "mlp."
    return {
        "input_layernorm": norm(at + "input_layernorm.weight", hidden),
        "self_attn.qk_proj": matrix(
            "linear", hidden, (attn + "q_proj.weight", q), (attn + "k_proj.weight", kv)
        ),
        "self_attn.v_proj": matrix("linear", hidden, (attn + "v_proj.weight", kv)),
        "self_attn.o_proj": matrix("linear", q, (attn + "o_proj.weight", hidden)),
        "post_attention_layernorm": norm(at + "post_attention_layernorm.weight", hidden),
        "mlp.gate_up_proj": matrix(
            "linear",
            hidden,
            (mlp + "gate_proj.weight", layer.ffn_width),
            (mlp + "up_proj.weight", layer.ffn_width),
        ),
        "mlp.down_proj": matrix("linear", layer.ffn_width, (mlp + "down_proj.weight", hidden)),
    }


def read_head_counts(config: ConfigReader, absent_kv_heads: int) -> tuple[int, int, int, int]:
    """Returns hidden size, query heads, key/value heads and head width.

    Args:
        config: the reader of ``config.json``.
        absent_kv_heads: key/value heads where the file has no such field, 0 for as many as query
            heads; null in the file always means as many as query heads.

    Raises:
        CheckpointError: query heads are not a multiple of key/value heads, or the file has no
            ``head_dim`` and the hidden size is not a multiple of query heads.
    """
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    named = "num_key_value_heads" in config.fields()
    kv_heads = config.integer("num_key_value_heads", heads if named else absent_kv_heads or heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"{config.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return hidden, heads, kv_heads, config.integer("head_dim", hidden // heads)
