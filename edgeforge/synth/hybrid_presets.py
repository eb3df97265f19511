"""Presets of models with Mamba 2 layers: Granite 4's released configurations, and a tiny one."""

from typing import Final

from edgeforge.synth.newer_presets import TINY, model_config
from edgeforge.synth.preset import Config, Preset, make_preset


def _kinds(layers: int, *attention: int) -> list[str]:
    return ["attention" if index in attention else "mamba" for index in range(layers)]


def _granite(**changes: object) -> Preset:
    config = model_config(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        "4.56.0",
        attention_bias=False,
        attention_multiplier=0.0078125,
        bos_token_id=100257,
        embedding_multiplier=12,
        eos_token_id=100257,
        hidden_act="silu",
        hidden_size=1536,
        intermediate_size=4096,
        layer_types=_kinds(40, 5, 15, 25, 35),
        logits_scaling=6,
        mamba_chunk_size=256,
        mamba_conv_bias=True,
        mamba_d_conv=4,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_n_heads=48,
        mamba_proj_bias=False,
        max_position_embeddings=131072,
        normalization_function="rmsnorm",
        num_attention_heads=12,
        num_experts_per_tok=0,
        num_hidden_layers=40,
        num_key_value_heads=4,
        num_local_experts=0,
        output_router_logits=False,
        pad_token_id=100256,
        position_embedding_type="nope",
        residual_multiplier=0.22,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=10000,
        router_aux_loss_coef=0.0,
        shared_intermediate_size=4096,
        tie_word_embeddings=True,
        vocab_size=100352,
    )
    return make_preset({**config, **changes})


_TINY: Final[Config] = {**TINY, "intermediate_size": 64, "num_hidden_layers": 3}

HYBRID_PRESETS: Final[dict[str, Preset]] = {
    "granite-4.0-h-350m": _granite(
        attention_multiplier=0.015625,
        hidden_size=768,
        intermediate_size=2048,
        layer_types=_kinds(32, 10, 13, 17, 27),
        logits_scaling=3,
        mamba_d_head=32,
        max_position_embeddings=32768,
        num_hidden_layers=32,
        residual_multiplier=0.246,
        shared_intermediate_size=2048,
    ),
    "granite-4.0-h-1b": _granite(),
    "granite-4.0-h-micro": _granite(
        attention_multiplier=0.015625,
        hidden_size=2048,
        intermediate_size=8192,
        logits_scaling=8,
        mamba_n_heads=64,
        num_attention_heads=32,
        num_key_value_heads=8,
        shared_intermediate_size=8192,
    ),
    "granite-4.0-h-tiny": _granite(
        intermediate_size=512,
        num_experts_per_tok=6,
        num_local_experts=64,
        shared_intermediate_size=1024,
    ),
    "tiny-granitemoehybrid": _granite(
        **_TINY,
        attention_multiplier=0.1,
        layer_types=_kinds(3, 1),
        mamba_d_head=24,
        mamba_d_state=16,
        mamba_n_heads=8,
        num_experts_per_tok=2,
        num_local_experts=8,
        shared_intermediate_size=96,
    ),
}
