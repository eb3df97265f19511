"""A tiny configuration of each family that transformers has, with all that makes it differ.

Widths are multiples of 32, so that every format fits. Windows, rotations and original contexts end
well inside the context of 48 tokens that tests declare.
"""

from __future__ import annotations

VOCAB, BOS, EOS = 320, 256, 257

Config = dict[str, object]


def _config(model_type: str, **changes: object) -> Config:
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **changes,
    }


def _rope(theta: float, **changes: object) -> Config:
    return {"rope_type": "default", "rope_theta": theta, **changes}


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CONFIGS: dict[str, Config] = {
    "gemma": _config(
        "gemma", hidden_size=96, head_dim=24, tie_word_embeddings=True, num_key_value_heads=1
    ),
    "gemma2": _config(
        "gemma2",
        head_dim=24,
        tie_word_embeddings=True,
        sliding_window=9,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": _config(
        "gemma3_text",
        head_dim=32,
        num_hidden_layers=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        sliding_window=7,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": _rope(5000.0, rope_type="linear", factor=2.0),
            "sliding_attention": _rope(100.0),
        },
    ),
    "granite": _config(
        "granite",
        embedding_multiplier=12.0,
        attention_multiplier=0.3,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
    "lfm2": _config(
        "lfm2",
        num_hidden_layers=4,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        block_multiple_of=32,
        tie_word_embeddings=True,
        rope_parameters=_rope(1000.0),
    ),
    "ministral3": _config(
        "ministral3",
        head_dim=24,
        rope_parameters=_YARN
        | {"rope_theta": 5000.0, "llama_4_scaling_beta": 0.4, "mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "olmo": _config("olmo", clip_qkv=1.5, num_key_value_heads=4),
    "olmo2": _config("olmo2", rms_norm_eps=1e-6),
    "olmo3": _config(
        "olmo3",
        num_hidden_layers=4,
        sliding_window=7,
        rope_parameters={
            "full_attention": _YARN | {"rope_theta": 5000.0},
            "sliding_attention": _rope(5000.0),
        },
    ),
    "phi": _config(
        "phi",
        num_key_value_heads=4,
        rope_parameters=_rope(100.0, partial_rotary_factor=0.5),
    ),
    "qwen2": _config("qwen2", tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen3": _config("qwen3", head_dim=24, tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen3_5_text": _config(
        "qwen3_5_text",
        head_dim=24,
        num_hidden_layers=4,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters=_rope(
            100.0, partial_rotary_factor=0.5, mrope_interleaved=True, mrope_section=[2, 2, 2]
        ),
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    ),
    "smollm3": _config("smollm3", num_hidden_layers=4, tie_word_embeddings=True),
    "stablelm": _config(
        "stablelm",
        use_qkv_bias=True,
        rope_parameters=_rope(100.0, partial_rotary_factor=0.25),
    ),
}

# Mixtures of experts: each with one expert that no token of a text chooses, or few do, because the
# router is random and most have many more experts than a token has.
MIXTURES: dict[str, Config] = {
    "mixtral": _config("mixtral", num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": _config(
        "qwen3_moe",
        head_dim=24,
        num_hidden_layers=3,
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
    ),
    "olmoe": _config(
        "olmoe",
        num_experts=16,
        num_experts_per_tok=4,
        intermediate_size=32,
        num_key_value_heads=4,
        clip_qkv=1.5,
    ),
    "granitemoe": _config(
        "granitemoe",
        num_local_experts=8,
        num_experts_per_tok=3,
        intermediate_size=32,
        embedding_multiplier=12.0,
        attention_multiplier=0.3,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
    "phimoe": _config(
        "phimoe",
        num_local_experts=8,
        num_experts_per_tok=2,
        router_jitter_noise=0.05,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=9,
    ),
    "qwen2_moe": _config(
        "qwen2_moe",
        num_hidden_layers=4,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=3,
        rms_norm_eps=1e-6,
    ),
    "jetmoe": _config(
        "jetmoe",
        num_attention_heads=6,
        num_key_value_heads=2,
        kv_channels=24,
        num_local_experts=5,
        num_experts_per_tok=3,
        intermediate_size=32,
        activation_function="silu",
        tie_word_embeddings=True,
    ),
}

# Models whose layers carry a memory from token to token.
RECURRENT: dict[str, Config] = {
    "granitemoehybrid": _config(
        "granitemoehybrid",
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=8,
        mamba_d_state=24,
        num_local_experts=8,
        num_experts_per_tok=3,
        intermediate_size=32,
        shared_intermediate_size=64,
        embedding_multiplier=12.0,
        attention_multiplier=0.3,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
}

# What transformers needs of the part of mistral3 that reads images.
PIXTRAL: Config = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
