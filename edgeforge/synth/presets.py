"""Model shapes that ``edgeforge synth`` can write: released configs, and tiny ones of each family.

Each preset has the released config.json (without ``auto_map``, because the folder contains no code)
and the generation config. The names and shapes of all weights follow from the config.
"""

from typing import Final

from edgeforge.families.openelm import make_divisible
from edgeforge.synth.delta_net_presets import DELTA_NET_PRESETS
from edgeforge.synth.hybrid_presets import HYBRID_PRESETS
from edgeforge.synth.mixture_presets import MIXTURE_PRESETS
from edgeforge.synth.newer_presets import NEWER_PRESETS
from edgeforge.synth.preset import (
    TINY_BOS,
    TINY_EOS,
    TINY_PAD,
    TINY_VOCAB,
    Config,
    Preset,
    make_preset,
)
from edgeforge.synth.recurrent_presets import RECURRENT_PRESETS


def _ramp(first: float, last: float, count: int) -> list[float]:
    """Returns ``count`` values from first to last in equal steps, rounded to two places."""
    return [round(first + (last - first) * i / (count - 1), 2) for i in range(count)]


def _openelm(layers: int, model_dim: int, head_dim: int, **changes: object) -> Preset:
    groups = 4
    q_dims = [make_divisible(model_dim * m, head_dim * groups) for m in _ramp(0.5, 1.0, layers)]
    config: Config = {
        "activation_fn_name": "swish",
        "architectures": ["OpenELMForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "ffn_dim_divisor": 256,
        "ffn_multipliers": _ramp(0.5, 4.0, layers),
        "ffn_with_glu": True,
        "head_dim": head_dim,
        "initializer_range": 0.02,
        "max_context_length": 2048,
        "model_dim": model_dim,
        "model_type": "openelm",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "num_gqa_groups": groups,
        "num_kv_heads": [q // head_dim // groups for q in q_dims],
        "num_query_heads": [q // head_dim for q in q_dims],
        "num_transformer_layers": layers,
        "qkv_multipliers": [0.5, 1.0],
        "rope_freq_constant": 10000,
        "rope_max_length": 4096,
        "share_input_output_layers": True,
        "transformers_version": "4.39.3",
        "use_cache": True,
        "vocab_size": 32000,
        **changes,
    }
    return make_preset(config)


def _llama3(max_positions: int, **changes: object) -> Preset:
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
        **changes,
    }
    return make_preset(config, do_sample=True, temperature=0.6, top_p=0.9)


def _llama3_scaling(factor: float, original: int) -> Config:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": original,
        "rope_type": "llama3",
    }


def _mistral(**changes: object) -> Preset:
    config: Config = {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
        **changes,
    }
    return make_preset(config)


def _phi3(**changes: object) -> Preset:
    config: Config = {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "transformers_version": "4.40.2",
        "use_cache": True,
        "vocab_size": 32064,
        **changes,
    }
    eos = config["eos_token_id"]
    ends = [32000, 32001, 32007] if eos == 32000 else [eos, config["pad_token_id"]]
    return make_preset(config, eos_token_id=ends, pad_token_id=config["pad_token_id"])


# Phi-3-mini-128k's rescale factors, one for each of the 48 rotary frequencies.
_PHI3_SHORT = [
    *[1.05, 1.05, 1.05, 1.1, 1.1, 1.15, 1.2000000000000002, 1.2500000000000002],
    *[1.3000000000000003, 1.3500000000000003, 1.5000000000000004],
    *[2.000000000000001] * 21,
    *[2.0500000000000007] * 3,
    *[2.1000000000000005] * 3,
    *[2.1500000000000004] * 2,
    *[2.3499999999999996, 2.549999999999999, 2.5999999999999988, 2.5999999999999988],
    *[2.7499999999999982, 2.849999999999998, 2.849999999999998, 2.9499999999999975],
]
_PHI3_LONG = [
    *[1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547],
    *[1.2299998998641968, 1.2299998998641968, 1.2999999523162842, 1.4499999284744263],
    *[1.5999999046325684, 1.6499998569488525, 1.8999998569488525, 2.859999895095825],
    *[3.68999981880188, 5.419999599456787, 5.489999771118164, 5.489999771118164],
    *[9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355],
    *[15.789999961853027, 18.360000610351562, 21.989999771118164, 23.079999923706055],
    *[30.009998321533203, 32.35000228881836, 32.590003967285156, 35.56000518798828],
    *[39.95000457763672, 53.840003967285156, 56.20000457763672, 57.95000457763672],
    *[59.29000473022461, 59.77000427246094, 59.920005798339844, 61.190006256103516],
    *[61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086],
    *[63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922],
    *[64.760009765625, 64.80001068115234, 64.81001281738281, 64.81001281738281],
]

_TINY: Config = {
    "vocab_size": TINY_VOCAB,
    "bos_token_id": TINY_BOS,
    "eos_token_id": TINY_EOS,
}

PRESETS: Final[dict[str, Preset]] = {
    "openelm-270m": _openelm(16, 1280, 64),
    "openelm-450m": _openelm(20, 1536, 64),
    "openelm-1.1b": _openelm(28, 2048, 64),
    "openelm-3b": _openelm(36, 3072, 128),
    "llama-3.2-1b": _llama3(
        131072,
        head_dim=64,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_hidden_layers=16,
        rope_scaling=_llama3_scaling(32.0, 8192),
    ),
    "llama-3.2-3b": _llama3(
        131072,
        head_dim=128,
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        num_hidden_layers=28,
        rope_scaling=_llama3_scaling(32.0, 8192),
    ),
    "llama-3-8b": _llama3(
        8192,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_hidden_layers=32,
        tie_word_embeddings=False,
        transformers_version="4.40.0.dev0",
    ),
    "mistral-7b": _mistral(),
    "phi-3-mini-4k": _phi3(),
    "phi-3-mini-128k": _phi3(
        max_position_embeddings=131072,
        rope_scaling={
            "long_factor": _PHI3_LONG,
            "short_factor": _PHI3_SHORT,
            "type": "longrope",
        },
        sliding_window=262144,
    ),
    "tiny-openelm": _openelm(
        3, 128, 16, ffn_dim_divisor=32, max_context_length=256, rope_max_length=512, **_TINY
    ),
    "tiny-llama": _llama3(
        512,
        head_dim=32,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        rope_scaling=_llama3_scaling(8.0, 64),
        **_TINY,
    ),
    "tiny-llama2": _llama3(
        256,
        hidden_size=96,
        intermediate_size=192,
        num_attention_heads=6,
        num_hidden_layers=2,
        num_key_value_heads=6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        transformers_version="4.31.0",
        **_TINY,
    ),
    "tiny-mistral": _mistral(
        hidden_size=128,
        intermediate_size=256,
        max_position_embeddings=512,
        num_attention_heads=8,
        num_hidden_layers=2,
        num_key_value_heads=2,
        sliding_window=32,
        **_TINY,
    ),
    "tiny-phi-3": _phi3(
        hidden_size=96,
        intermediate_size=192,
        max_position_embeddings=128,
        num_attention_heads=3,
        num_hidden_layers=2,
        num_key_value_heads=3,
        original_max_position_embeddings=128,
        pad_token_id=TINY_PAD,
        sliding_window=47,
        **_TINY,
    ),
    "tiny-phi-3-128k": _phi3(
        hidden_size=96,
        intermediate_size=192,
        max_position_embeddings=256,
        num_attention_heads=3,
        num_hidden_layers=2,
        num_key_value_heads=3,
        original_max_position_embeddings=64,
        pad_token_id=TINY_PAD,
        rope_scaling={
            "long_factor": [round(1 + 0.45 * i, 2) for i in range(16)],
            "short_factor": [round(1 + 0.08 * i, 2) for i in range(16)],
            "type": "longrope",
        },
        sliding_window=512,
        **_TINY,
    ),
    **NEWER_PRESETS,
    **MIXTURE_PRESETS,
    **DELTA_NET_PRESETS,
    **RECURRENT_PRESETS,
    **HYBRID_PRESETS,
}
