"""Presets of models without attention: released configurations of RWKV, and tiny ones."""

from typing import Final

from edgeforge.synth.newer_presets import TINY
from edgeforge.synth.preset import Config, Preset, make_preset


def _rwkv(number: int, **changes: object) -> Preset:
    config: Config = {
        "architectures": [f"Rwkv{number}ForCausalLM"],
        "attention_hidden_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_size": 64,
        "head_size_divisor": 8,
        "hidden_size": 2048,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-05,
        "model_type": f"rwkv{number}",
        "model_version": "5_2" if number == 5 else "6_0",
        "num_attention_heads": 64,
        "num_hidden_layers": 24,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "transformers_version": "4.34.0",
        "use_cache": True,
        "vocab_size": 65536,
    }
    return make_preset({**config, **changes})


_TINY: Final[Config] = {
    name: TINY[name] for name in ("bos_token_id", "eos_token_id", "hidden_size", "vocab_size")
} | {
    "attention_hidden_size": TINY["hidden_size"],
    "head_size": 32,
    "num_attention_heads": 32,
    "num_hidden_layers": TINY["num_hidden_layers"],
}

RECURRENT_PRESETS: Final[dict[str, Preset]] = {
    "rwkv5-1.5b": _rwkv(5),
    "rwkv6-1.6b": _rwkv(6),
    "tiny-rwkv5": _rwkv(5, **_TINY),
    "tiny-rwkv6": _rwkv(6, **_TINY),
}
