"""The config.json files of released models, field for field, are read as what they are.

Parameter counts are those that the publishers state; names and shapes are held against
transformers.
"""

import pytest
import torch

from edgeforge.families.registry import read_spec
from edgeforge.synth.synthesise import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_1_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
TINYLLAMA = LLAMA_2_7B | {
    "attention_bias": False,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
}
SMOLLM2_135M = TINYLLAMA | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
LLAMA_31_8B = {
    **PRESETS["llama-3-8b"].config,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
}
MISTRAL_V01 = {
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
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_V03 = MISTRAL_V01 | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
MISTRAL_NEMO = MISTRAL_V03 | {
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 40,
    "vocab_size": 131072,
}
PHI3_MAP = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
PHI3_4K = {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": PHI3_MAP,
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
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "attention_bias": False,
    "vocab_size": 32064,
}
PHI3_128K = PHI3_4K | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        **PRESETS["phi-3-mini-128k"].config["rope_scaling"],
        "type": "su",
    },
    "sliding_window": 262144,
}
PHI35 = PHI3_128K | {
    "rope_scaling": {**PHI3_128K["rope_scaling"], "type": "longrope"},
    "transformers_version": "4.43.3",
}
PHI3_MEDIUM_4K = PHI3_4K | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
}
PHI4_MINI = PHI35 | {
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "pad_token_id": 199999,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "long_factor": [1 + 0.5 * i for i in range(48)],
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
OPENELM_270M = {
    **PRESETS["openelm-270m"].config,
    "auto_map": {
        "AutoConfig": "configuration_openelm.OpenELMConfig",
        "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
    },
    "torch_dtype": "float32",
}

RELEASED = {
    "Llama-1-7B": (LLAMA_1_7B, 6_738_415_616, 2048, 0, "default"),
    "Llama-2-7B": (LLAMA_2_7B, 6_738_415_616, 4096, 0, "default"),
    "TinyLlama-1.1B": (TINYLLAMA, 1_100_048_384, 2048, 0, "default"),
    "SmolLM2-135M": (SMOLLM2_135M, 134_515_008, 8192, 0, "default"),
    "Llama-3.1-8B": (LLAMA_31_8B, 8_030_261_248, 131072, 0, "llama3"),
    "Llama-3.2-1B": (PRESETS["llama-3.2-1b"].config, 1_235_814_400, 131072, 0, "llama3"),
    "Mistral-7B-v0.1": (MISTRAL_V01, 7_241_732_096, 32768, 4096, "default"),
    "Mistral-7B-v0.3": (MISTRAL_V03, 7_248_023_552, 32768, 0, "default"),
    "Mistral-Nemo": (MISTRAL_NEMO, 12_247_782_400, 131072, 0, "default"),
    "Phi-3-mini-4k": (PHI3_4K, 3_821_079_552, 4096, 2047, "default"),
    "Phi-3-mini-128k": (PHI3_128K, 3_821_079_552, 131072, 262144, "longrope"),
    "Phi-3.5-mini": (PHI35, 3_821_079_552, 131072, 262144, "longrope"),
    "Phi-3-medium-4k": (PHI3_MEDIUM_4K, 13_960_238_080, 4096, 2047, "default"),
    "Phi-4-mini": (PHI4_MINI, 3_836_021_760, 131072, 262144, "longrope"),
    "OpenELM-270M": (OPENELM_270M, 271_527_168, 2048, 0, "default"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_is_read(name):
    config, parameters, context, window, scaling = RELEASED[name]
    spec = read_spec(config)
    assert spec.num_parameters == parameters
    assert (spec.max_context, spec.window, spec.rope.scaling) == (context, window, scaling)
    assert spec.tied == (name in ("SmolLM2-135M", "Llama-3.2-1B", "Phi-4-mini", "OpenELM-270M"))
    assert spec.bos == config["bos_token_id"]
    ends = config["eos_token_id"]
    assert spec.eos == tuple(ends if isinstance(ends, list) else [ends])


# transformers has no OpenELM, and refuses the first spelling of Phi-3's rope.
UNKNOWN_TO_TRANSFORMERS = ("OpenELM-270M", "Phi-3-mini-128k")


@pytest.mark.parametrize("name", [n for n in RELEASED if n not in UNKNOWN_TO_TRANSFORMERS])
def test_tensor_names_and_shapes_are_those_of_transformers(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**RELEASED[name][0], "num_hidden_layers": 2}
    config.pop("auto_map", None)
    spec = read_spec(config)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(spec.model_type, **fields))
    theirs = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    if spec.tied:
        del theirs["lm_head.weight"]
    ours = {p.tensor: p.tensor_shape for weight in spec.weights.values() for p in weight.pieces}
    assert ours == theirs


def test_phi_4_mini_turns_three_quarters_of_each_head():
    assert read_spec(PHI4_MINI).rope.width == 96
    assert read_spec(PHI4_MINI).head_dim == 128


def test_phi_3_128k_is_the_same_under_both_names_of_its_rope():
    assert read_spec(PHI3_128K) == read_spec(PHI35)
    assert read_spec(PHI35).rope.original_context == 4096
    # sqrt(1 + ln(131072 / 4096) / ln(4096)), as the model's own code has it
    assert read_spec(PHI35).rope.attention_factor == pytest.approx(1.190238, abs=1e-6)
