"""Presets of the families with gated delta nets: a released configuration, and a tiny one."""

from __future__ import annotations

from typing import Final

from edgeforge.synth.newer_presets import TINY
from edgeforge.synth.preset import Config, Preset, make_preset


def _qwen3_5(**changes: object) -> Config:
    """Returns the configuration of a text part."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": 248044,
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3584,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "vocab_size": 248320,
        **changes,
    }


_SMALL: Final = {
    **TINY,
    "full_attention_interval": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "num_hidden_layers": 4,
}

DELTA_NET_PRESETS: Final[dict[str, Preset]] = {
    # The text part of the released model, without the tower for images.
    "qwen3.5-0.8b": make_preset({"architectures": ["Qwen3_5ForCausalLM"], **_qwen3_5()}),
    "tiny-qwen3.5": make_preset(
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "bos_token_id": TINY["bos_token_id"],
            "eos_token_id": TINY["eos_token_id"],
            "image_token_id": 248056,
            "model_type": "qwen3_5",
            "text_config": _qwen3_5(**_SMALL),
            "tie_word_embeddings": True,
            "transformers_version": "4.57.0.dev0",
            "vision_config": {"hidden_size": 32, "model_type": "qwen3_5"},
        }
    ),
    "tiny-qwen3.5-text": make_preset(
        {"architectures": ["Qwen3_5ForCausalLM"], **_qwen3_5(**_SMALL)}
    ),
}
