"""Presets of mixtures of experts: released configurations, and a tiny one of each family."""

from typing import Final

from edgeforge.synth.newer_presets import TINY, model_config
from edgeforge.synth.preset import Config, Preset, make_preset


def _mixture(model_type: str, architecture: str, version: str, **fields: object) -> Preset:
    common: Config = {
        "hidden_act": "silu",
        "output_router_logits": False,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    }
    return make_preset(model_config(model_type, architecture, version, **{**common, **fields}))


def _mixtral(**changes: object) -> Preset:
    fields: Config = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    }
    return _mixture("mixtral", "MixtralForCausalLM", "4.36.0.dev0", **{**fields, **changes})


def _qwen3_moe(**changes: object) -> Preset:
    fields: Config = {
        "attention_bias": False,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    return _mixture("qwen3_moe", "Qwen3MoeForCausalLM", "4.51.0", **{**fields, **changes})


def _qwen2_moe(**changes: object) -> Preset:
    fields: Config = {
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    return _mixture("qwen2_moe", "Qwen2MoeForCausalLM", "4.39.0.dev0", **{**fields, **changes})


def _olmoe(**changes: object) -> Preset:
    fields: Config = {
        "attention_bias": False,
        "bos_token_id": None,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "vocab_size": 50304,
    }
    return _mixture("olmoe", "OlmoeForCausalLM", "4.43.0.dev0", **{**fields, **changes})


def _granitemoe(**changes: object) -> Preset:
    fields: Config = {
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "logits_scaling": 6.0,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    }
    return _mixture("granitemoe", "GraniteMoeForCausalLM", "4.47.0", **{**fields, **changes})


def _phimoe(**changes: object) -> Preset:
    fields: Config = {
        "attention_bias": True,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "hidden_size": 4096,
        "input_jitter_noise": 0.01,
        "intermediate_size": 6400,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "vocab_size": 32064,
    }
    return _mixture("phimoe", "PhimoeForCausalLM", "4.43.3", **{**fields, **changes})


def _jetmoe(**changes: object) -> Preset:
    fields: Config = {
        "activation_function": "silu",
        "aux_loss_coef": 0.01,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "kv_channels": 128,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 32000,
    }
    fields |= changes
    return make_preset(model_config("jetmoe", "JetMoeForCausalLM", "4.40.0.dev0", **fields))


def _stretched(short: list[float], long: list[float], original: int, magnitude: float) -> Config:
    return {
        "long_factor": long,
        "long_mscale": magnitude,
        "original_max_position_embeddings": original,
        "short_factor": short,
        "short_mscale": magnitude,
        "type": "longrope",
    }


# Phi-3.5-MoE's rescale factors, one for each of the 64 rotary frequencies, to two places.
_PHIMOE_SHORT = [
    *[1.0, 1.04, 1.04, 1.04],
    *[1.05, 1.05, 1.05, 1.05],
    *[1.05, 1.05, 1.05, 1.05],
    *[1.05, 1.05, 1.06, 1.06],
    *[1.07, 1.07, 1.07, 1.07],
    *[1.14, 1.16, 1.16, 1.16],
    *[1.16, 1.18, 1.2, 1.32],
    *[1.34, 1.35, 1.4, 1.48],
    *[1.5, 1.59, 1.65, 1.72],
    *[1.9, 1.91, 1.91, 1.99],
    *[2.0, 2.0, 2.01, 2.01],
    *[2.01, 2.01, 2.01, 2.01],
    *[2.01, 2.01, 2.01, 2.01],
    *[2.01, 2.01, 2.01, 2.01],
    *[2.01, 2.01, 2.01, 2.1],
    *[2.32, 2.42, 2.59, 2.79],
]
_PHIMOE_LONG = [
    *[1.02, 1.03, 1.04, 1.05],
    *[1.05, 1.05, 1.06, 1.06],
    *[1.06, 1.06, 1.06, 1.06],
    *[1.1, 1.18, 1.18, 1.37],
    *[1.49, 2.11, 2.89, 3.95],
    *[4.3, 6.43, 8.09, 10.69],
    *[12.05, 18.23, 18.84, 19.9],
    *[21.42, 26.2, 34.28, 34.59],
    *[38.73, 40.22, 42.54, 44.0],
    *[47.59, 54.75, 56.19, 57.44],
    *[57.49, 61.2, 61.54, 61.75],
    *[61.78, 62.07, 63.11, 63.43],
    *[63.56, 63.71, 63.92, 63.94],
    *[63.94, 63.96, 63.98, 64.03],
    *[64.03, 64.03, 64.04, 64.1],
    *[64.19, 64.21, 64.75, 64.96],
]

MIXTURE_PRESETS: Final[dict[str, Preset]] = {
    "mixtral-8x7b": _mixtral(),
    "qwen3-30b-a3b": _qwen3_moe(),
    "qwen1.5-moe-a2.7b": _qwen2_moe(),
    "olmoe-1b-7b": _olmoe(),
    "granite-3.1-1b-a400m": _granitemoe(),
    "phi-3.5-moe": _phimoe(
        rope_scaling=_stretched(_PHIMOE_SHORT, _PHIMOE_LONG, 4096, 1.243163121016122)
    ),
    "jetmoe-8b": _jetmoe(),
    "tiny-mixtral": _mixtral(**TINY),
    "tiny-qwen3-moe": _qwen3_moe(
        **TINY, head_dim=32, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2
    ),
    "tiny-qwen2-moe": _qwen2_moe(
        **{**TINY, "num_hidden_layers": 3},
        mlp_only_layers=[1],
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=128,
    ),
    "tiny-olmoe": _olmoe(**{**TINY, "intermediate_size": 64}, num_experts=8, num_experts_per_tok=2),
    "tiny-granitemoe": _granitemoe(
        **{**TINY, "intermediate_size": 64},
        attention_multiplier=0.1,
        num_experts_per_tok=2,
        num_local_experts=8,
    ),
    "tiny-phimoe": _phimoe(
        **TINY,
        num_local_experts=8,
        original_max_position_embeddings=64,
        rope_scaling=_stretched(
            [round(1 + 0.08 * i, 2) for i in range(12)],
            [round(1 + 0.45 * i, 2) for i in range(12)],
            64,
            1.2,
        ),
        sliding_window=47,
    ),
    "tiny-jetmoe": _jetmoe(**TINY, kv_channels=32, num_local_experts=4),
}
