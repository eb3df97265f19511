"""Phi-3-mini (4k and 128k) and the Phi-3 family: fused projections, longrope, a window."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.assembly import matrix, norm, packed_qkv
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.spec import LayerSpec, ModelSpec, WeightSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Phi-3 configuration (transformers' ``Phi3Config`` fields)."""
    config.absent("attention_bias", "mlp_bias", "lm_head_bias")
    # Phi-4-mini's files have these factors; a factor of 1 changes nothing.
    config.require("full_attn_mod", 1)
    config.require("interpolate_factor", 1)
    config.get("original_max_position_embeddings")  # files without longrope have it, unused
    family = Conventions(
        "phi3",
        window=config.integer("sliding_window", 0, minimum=0),
        norm_eps=1e-5,
        max_context=4096,
        original_context=4096,
        partial_rotary=True,
        layer_weights=fused_projections,
    )
    return read_llama_like(config, generation, family)


def fused_projections(
    index: int, layer: LayerSpec, *, hidden: int, head_dim: int
) -> dict[str, WeightSpec]:
    """Returns one layer's weights, for a checkpoint with fused q/k/v and fused gate/up tensors."""
    at = f"model.layers.{index}."
    q, kv = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
    attn, mlp = at + "self_attn.", at + "mlp."
    qk, v = packed_qkv(attn + "qkv_proj.weight", hidden, q, kv)
    return {
        "input_layernorm": norm(at + "input_layernorm.weight", hidden),
        "self_attn.qk_proj": qk,
        "self_attn.v_proj": v,
        "self_attn.o_proj": matrix("linear", q, (attn + "o_proj.weight", hidden)),
        "post_attention_layernorm": norm(at + "post_attention_layernorm.weight", hidden),
        "mlp.gate_up_proj": matrix(
            "linear", hidden, (mlp + "gate_up_proj.weight", 2 * layer.ffn_width)
        ),
        "mlp.down_proj": matrix("linear", layer.ffn_width, (mlp + "down_proj.weight", hidden)),
    }
