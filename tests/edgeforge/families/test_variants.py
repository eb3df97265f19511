"""Variants of the families against transformers: past windows and original contexts."""

import numpy as np
import pytest
import torch

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.gemma import embedding_factor
from edgeforge.families.registry import read_spec
from tests.oracles.tiny_families import CONFIGS, VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONV = ["conv", "full_attention", "conv"]

# What differs from the family's configuration in `tiny_families`.
VARIANTS = {
    "qwen2: windows from the second layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2: a window that is off": ("qwen2", {"sliding_window": 7, "max_window_layers": 1}),
    "qwen2: YaRN, five query heads on one": (
        "qwen2",
        {"rope_parameters": YARN, "num_attention_heads": 5, "num_key_value_heads": 1}
        | {"hidden_size": 80, "tie_word_embeddings": False},
    ),
    "qwen3: biases and YaRN with bounds of its own": (
        "qwen3",
        {"attention_bias": True}
        | {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}},
    ),
    "smollm3: windows where no layer rotates": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [0, 1, 1, 0]}
        | {"mlp_bias": True},
    ),
    "granite: all biases, untied": (
        "granite",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "olmo: no bound, biases": ("olmo", {"clip_qkv": None, "attention_bias": True}),
    "olmo2: awkward heads": (
        "olmo2",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 60},
    ),
    "gemma: the first files' name of the GELU": ("gemma", {"hidden_act": "gelu"}),
    "gemma2: no bounds, every layer slides": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 1},
    ),
    "gemma3_text: a bound on logits, biases, no window": (
        "gemma3_text",
        {"final_logit_softcapping": 3.0, "attention_bias": True}
        | {"layer_types": ["full_attention"] * 3},
    ),
    "lfm2: biases, a convolution of four": (
        "lfm2",
        {"conv_bias": True, "conv_L_cache": 4, "layer_types": CONV, "num_hidden_layers": 3},
    ),
    "lfm2: a width that is stated": (
        "lfm2",
        {"block_auto_adjust_ff_dim": False, "layer_types": ["conv"] * 4},
    ),
    "phi: grouped, another GELU": ("phi", {"num_key_value_heads": 2, "hidden_act": "gelu"}),
    "stablelm: parallel parts": ("stablelm", {"use_parallel_residual": True}),
    "stablelm: no biases": ("stablelm", {"use_qkv_bias": False}),
    "ministral3: a window": ("ministral3", {"sliding_window": 9}),
    "ministral3: growth without YaRN": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "llama_4_scaling_beta": 0.3,
                "original_max_position_embeddings": 8,
            }
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_the_logits_of_transformers(variant, tmp_path, hugging_face, traced):
    family, changes = VARIANTS[variant]
    folder = hugging_face.save(tmp_path, CONFIGS[family] | changes)
    tokens = traced.tokens(48, VOCAB)
    expected = hugging_face.logits(folder, tokens)
    session = traced.session(traced.model(folder), 48)
    parts = [tokens[:3], *np.split(tokens[3:23], 20), tokens[23:]]
    grown = np.concatenate([session.extend(part) for part in parts])
    assert traced.difference(grown, expected) < traced.TOLERANCE


def test_minicpm_is_granite_with_factors_that_follow(tmp_path, hugging_face, traced):
    """transformers has no MiniCPM; its Granite multiplies in the same four places."""
    factors = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 16**-0.5,
        "residual_multiplier": 1.4 / 2**0.5,
        "logits_scaling": 64 / 24,
    }
    folder = hugging_face.save(tmp_path, CONFIGS["granite"] | factors)
    tokens = traced.tokens(40, VOCAB)
    expected = hugging_face.logits(folder, tokens)
    own = {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 24}
    hugging_face.set_config(folder, tuple(factors), **own, architectures=["MiniCPMForCausalLM"])
    opened = traced.model(folder)
    assert opened.spec.model_type == "minicpm"
    ours = traced.session(opened, 48).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_factor_on_gemmas_embedding_is_rounded_as_torch_rounds(dtype):
    reader = ConfigReader({"torch_dtype": dtype})
    for hidden in (3, 640, 1152, 2304, 2560, 3072, 3584, 3840, 5376):
        rounded = torch.tensor(hidden**0.5, dtype=getattr(torch, dtype)).item()
        assert embedding_factor(reader, hidden) == rounded
    assert embedding_factor(ConfigReader({"torch_dtype": "bfloat16"}), 3072) == 55.5


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("phi", {"qk_layernorm": True}, "'qk_layernorm' to True"),
        ("stablelm", {"qk_layernorm": True}, "'qk_layernorm' to True"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' to 50.0"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types[0]"),
        ("qwen2", {"layer_types": ["full_attention"]}, "must list 2 kinds"),
        ("qwen2", {"use_mrope": True}, "'use_mrope' to True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must list 4 numbers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers must list 4 numbers"),
        ("lfm2", {"full_attn_idxs": [0]}, "layer_types and full_attn_idxs contradict"),
        ("lfm2", {"full_attn_idxs": [9]}, "full_attn_idxs must list layers"),
        ("lfm2", {"conv_dim": 32}, "'conv_dim' to 32"),
        ("lfm2", {"block_use_swiglu": False}, "'block_use_swiglu' to False"),
        ("olmo2", {"clip_qkv": 8.0}, "'clip_qkv' to 8.0"),
        ("gemma2", {"sliding_window_size": 5}, "'sliding_window_size' to 5"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("olmo3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "contradict"),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(family, changes, words):
    with pytest.raises(CheckpointError) as caught:
        read_spec(CONFIGS[family] | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_factors_that_repeat_what_the_spec_computes_pass():
    for family, changes in (
        ("granite", {"scale_emb": 12.0, "logit_scale": 0.125}),
        ("qwen3", {"query_pre_attn_scalar": 24, "embedding_multiplier": 1}),
        ("phi", {"rotary_pct": 0.5, "rope_pct": 0.5}),
        ("lfm2", {"full_attn_idxs": [1, 3]}),
    ):
        assert read_spec(CONFIGS[family] | changes) == read_spec(CONFIGS[family])
    with pytest.raises(CheckpointError, match=r"'rotary_pct' to 0\.25"):
        read_spec(CONFIGS["phi"] | {"rotary_pct": 0.25})


def test_contexts_of_stretched_rotations():
    yarn = read_spec(CONFIGS["qwen2"] | {"rope_parameters": YARN | {"factor": 100.0}})
    assert yarn.max_context == 1600
    assert read_spec(CONFIGS["gemma3_text"]).max_context == 256  # stated stretched
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert read_spec(CONFIGS["qwen2"] | {"rope_parameters": linear}).max_context == 1024
