"""Presets of the families from Qwen2 on: released configurations, and a tiny one of each family."""

from typing import Final

from edgeforge.synth.preset import (
    TINY_BOS,
    TINY_EOS,
    TINY_PAD,
    TINY_VOCAB,
    Config,
    Preset,
    make_preset,
)

TINY: Final[Config] = {
    "vocab_size": TINY_VOCAB,
    "bos_token_id": TINY_BOS,
    "eos_token_id": TINY_EOS,
    "hidden_size": 96,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": TINY_PAD,
}
"""The dimensions of the tiny presets."""


def model_config(model_type: str, architecture: str, version: str, **fields: object) -> Config:
    """Returns a config.json with the fields that all families have, and those given.

    Args:
        model_type: the family's name.
        architecture: the class of transformers.
        version: the release of transformers that wrote the released file.
        fields: further fields.
    """
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "model_type": model_type,
        "transformers_version": version,
        "use_cache": True,
        **fields,
    }


def _qwen(model_type: str, **changes: object) -> Preset:
    second = model_type == "qwen2"
    config = model_config(
        model_type,
        "Qwen2ForCausalLM" if second else "Qwen3ForCausalLM",
        "4.43.1" if second else "4.51.0",
        bos_token_id=151643,
        eos_token_id=151645,
        hidden_act="silu",
        max_position_embeddings=32768 if second else 40960,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768 if second else None,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=151936,
    )
    return make_preset({**config, **changes})


def _gemma3(**changes: object) -> Preset:
    config = model_config(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "4.50.0.dev0",
        attention_bias=False,
        attn_logit_softcapping=None,
        bos_token_id=2,
        eos_token_id=1,
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=32768,
        num_attention_heads=4,
        num_key_value_heads=1,
        pad_token_id=0,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        sliding_window=512,
        sliding_window_pattern=6,
        vocab_size=262144,
    )
    return make_preset({**config, **changes})


def _gemma(model_type: str, **changes: object) -> Config:
    number = model_type.removeprefix("gemma")
    return model_config(
        model_type,
        f"Gemma{number}ForCausalLM",
        "4.42.4",
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-06,
        rope_theta=10000.0,
        **{**TINY, "head_dim": 32, **changes},
    )


def _granite(**changes: object) -> Preset:
    config = model_config(
        "granite",
        "GraniteForCausalLM",
        "4.49.0",
        attention_bias=False,
        attention_multiplier=0.015625,
        bos_token_id=0,
        embedding_multiplier=12.0,
        eos_token_id=0,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=8192,
        logits_scaling=8.0,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=40,
        num_key_value_heads=8,
        pad_token_id=0,
        residual_multiplier=0.22,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=10000000.0,
        tie_word_embeddings=True,
        vocab_size=49159,
    )
    return make_preset({**config, **changes})


def _smollm3(**changes: object) -> Preset:
    config = model_config(
        "smollm3",
        "SmolLM3ForCausalLM",
        "4.54.0.dev0",
        attention_bias=False,
        bos_token_id=128000,
        eos_token_id=128012,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=11008,
        max_position_embeddings=65536,
        mlp_bias=False,
        no_rope_layer_interval=4,
        num_attention_heads=16,
        num_hidden_layers=36,
        num_key_value_heads=4,
        pad_token_id=128004,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=5000000.0,
        sliding_window=None,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=128256,
    )
    return make_preset({**config, **changes})


def _olmo(model_type: str, version: str, **changes: object) -> Preset:
    architecture = f"Olmo{model_type.removeprefix('olmo')}ForCausalLM"
    config = model_config(
        model_type,
        architecture,
        version,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=100257,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=8192,
        max_position_embeddings=4096,
        num_attention_heads=16,
        num_hidden_layers=16,
        num_key_value_heads=16,
        pad_token_id=100277,
        rope_scaling=None,
        rope_theta=500000,
        tie_word_embeddings=False,
        vocab_size=100352,
    )
    if model_type != "olmo":
        config["rms_norm_eps"] = 1e-06
    return make_preset({**config, **changes})


def _lfm2(hidden: int, ffn: int, heads: int, **changes: object) -> Preset:
    attends = (2, 5, 8, 10, 12, 14)
    config = model_config(
        "lfm2",
        "Lfm2ForCausalLM",
        "4.54.0.dev0",
        block_auto_adjust_ff_dim=True,
        block_dim=hidden,
        block_ff_dim=ffn,
        block_ffn_dim_multiplier=1.0,
        block_multiple_of=256,
        block_norm_eps=1e-05,
        block_use_swiglu=True,
        bos_token_id=1,
        conv_L_cache=3,
        conv_bias=False,
        conv_dim=hidden,
        eos_token_id=7,
        hidden_size=hidden,
        layer_types=["full_attention" if n in attends else "conv" for n in range(16)],
        max_position_embeddings=128000,
        norm_eps=1e-05,
        num_attention_heads=heads,
        num_heads=heads,
        num_hidden_layers=16,
        num_key_value_heads=8,
        pad_token_id=0,
        rope_theta=1000000.0,
        use_pos_enc=True,
        vocab_size=65536,
    )
    return make_preset({**config, **changes})


def _phi(model_type: str, architecture: str, **changes: object) -> Preset:
    """Returns a tiny model of a family with LayerNorm: Phi's or StableLM's."""
    config = model_config(
        model_type,
        architecture,
        "4.38.0",
        layer_norm_eps=1e-05,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    return make_preset({**config, **TINY, **changes})


_KINDS: Final = ["sliding_attention", "full_attention"]

NEWER_PRESETS: Final[dict[str, Preset]] = {
    "qwen2.5-0.5b": _qwen(
        "qwen2",
        hidden_size=896,
        intermediate_size=4864,
        max_window_layers=21,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
    ),
    "qwen2.5-1.5b": _qwen(
        "qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        max_window_layers=21,
        num_attention_heads=12,
        num_hidden_layers=28,
        num_key_value_heads=2,
    ),
    "qwen3-0.6b": _qwen(
        "qwen3",
        attention_bias=False,
        head_dim=128,
        hidden_size=1024,
        intermediate_size=3072,
        max_window_layers=28,
        num_attention_heads=16,
        num_hidden_layers=28,
        num_key_value_heads=8,
    ),
    "gemma-3-270m": _gemma3(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "gemma-3-1b": _gemma3(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26),
    "smollm3-3b": _smollm3(),
    "granite-3.3-2b": _granite(),
    "olmo2-1b": _olmo("olmo2", "4.51.0"),
    "lfm2-350m": _lfm2(1024, 6656, 16),
    "lfm2-1.2b": _lfm2(2048, 12288, 32),
    "tiny-qwen2": _qwen("qwen2", **TINY),
    "tiny-qwen3": _qwen("qwen3", head_dim=32, **TINY),
    "tiny-gemma": make_preset(_gemma("gemma")),
    "tiny-gemma2": make_preset(_gemma("gemma2", sliding_window=32)),
    "tiny-gemma3": make_preset(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "bos_token_id": TINY_BOS,
            "eos_token_id": TINY_EOS,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                **TINY,
                "head_dim": 32,
                "layer_types": _KINDS,
                "model_type": "gemma3_text",
                "sliding_window": 32,
            },
            "transformers_version": "4.50.0.dev0",
            "vision_config": {"hidden_size": 32, "model_type": "siglip_vision_model"},
        }
    ),
    "tiny-gemma3-text": _gemma3(
        **{**TINY, "head_dim": 32, "num_hidden_layers": 3},
        query_pre_attn_scalar=32,
        rope_local_base_freq=100.0,
        sliding_window=32,
        sliding_window_pattern=3,
    ),
    "tiny-granite": _granite(**TINY, attention_multiplier=0.1),
    "tiny-lfm2": _lfm2(
        96,
        288,
        4,
        **{**TINY, "num_hidden_layers": 3},
        block_multiple_of=64,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "tiny-minicpm": make_preset(
        model_config(
            "minicpm",
            "MiniCPMForCausalLM",
            "4.36.0",
            **TINY,
            dim_model_base=48,
            hidden_act="silu",
            rms_norm_eps=1e-05,
            scale_depth=1.4,
            scale_emb=12,
        )
    ),
    "tiny-mistral3": make_preset(
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "bos_token_id": TINY_BOS,
            "eos_token_id": TINY_EOS,
            "image_token_index": 10,
            "model_type": "mistral3",
            "text_config": {
                **TINY,
                "head_dim": 32,
                "hidden_act": "silu",
                "model_type": "mistral",
                "rms_norm_eps": 1e-05,
                "rope_theta": 1e9,
                "sliding_window": None,
                "tie_word_embeddings": False,
            },
            "transformers_version": "4.50.0.dev0",
            "tie_word_embeddings": False,
            "vision_config": {"hidden_size": 32, "model_type": "pixtral"},
        }
    ),
    "tiny-ministral3": make_preset(
        model_config(
            "ministral3",
            "Ministral3ForCausalLM",
            "5.0.0.dev0",
            **TINY,
            head_dim=32,
            hidden_act="silu",
            rms_norm_eps=1e-05,
            rope_parameters={
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 4.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
            },
            sliding_window=None,
            tie_word_embeddings=False,
        )
    ),
    "tiny-olmo": _olmo("olmo", "4.40.0", **TINY, clip_qkv=8.0),
    "tiny-olmo2": _olmo("olmo2", "4.51.0", **TINY),
    "tiny-olmo3": _olmo("olmo3", "4.57.0", **TINY, layer_types=_KINDS, sliding_window=32),
    "tiny-phi": _phi("phi", "PhiForCausalLM", hidden_act="gelu_new", partial_rotary_factor=0.5),
    "tiny-smollm3": _smollm3(**{**TINY, "num_hidden_layers": 4}),
    "tiny-stablelm": _phi(
        "stablelm", "StableLmForCausalLM", partial_rotary_factor=0.25, use_qkv_bias=True
    ),
}
