"""FLOAT logits of traced Llama, Mistral and Phi-3 checkpoints against transformers."""

import numpy as np
import pytest
import torch

from edgeforge.families.registry import FAMILIES, read_spec

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 83,
    "hidden_size": 60,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": None,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": None}
PHI3 = LLAMA | {
    "model_type": "phi3",
    "original_max_position_embeddings": 128,
    "sliding_window": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1 + 0.3 * i for i in range(10)],
        "long_factor": [1.5 + 2.5 * i for i in range(10)],
    },
}

# name: configuration, dtype of the file, size of a shard
CASES = {
    "llama, one key/value head": (LLAMA, "float32", "20KB"),
    "llama, 5 heads wider than the residual stream, tied": (
        LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 14}
        | {"tie_word_embeddings": True},
        "bfloat16",
        "1GB",
    ),
    "llama, 15 heads in groups of 3, llama3 rope": (
        LLAMA | {"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 8}
        | {"rope_parameters": LLAMA3_ROPE},
        "float16",
        "10KB",
    ),
    "llama, linear rope, one layer of one head": (
        LLAMA | {"num_attention_heads": 1, "num_hidden_layers": 1, "hidden_size": 22}
        | {"rope_parameters": {"rope_type": "linear", "factor": 3.5, "rope_theta": 800.0}},
        "float32",
        "1GB",
    ),
    "mistral, heads that do not divide the residual stream": (
        MISTRAL | {"hidden_size": 50, "head_dim": 6, "vocab_size": 61},
        "float32",
        "1GB",
    ),
    "mistral, window": (
        MISTRAL | {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 7},
        "bfloat16",
        "20KB",
    ),
    "phi3, window": (
        PHI3 | {"num_key_value_heads": 3, "sliding_window": 9},
        "float16",
        "30KB",
    ),
    "phi3, grouped, partial rotary, tied": (
        PHI3 | {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.75,
        }},
        "float32",
        "1GB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_in_both_spellings(case, tmp_path, hugging_face, traced):
    config, dtype, shard_size = CASES[case]
    folder = hugging_face.save(tmp_path / "model", config, dtype, shard_size)
    shards = len(list(folder.glob("*.safetensors")))
    assert (shards > 1) == (shard_size != "1GB")
    tokens = traced.tokens(40, config["vocab_size"])
    expected = hugging_face.logits(folder, tokens)

    opened = traced.model(folder)
    assert {entry.dtype for entry in opened.checkpoint.tensors.values()} == {dtype}
    ours = traced.session(opened, 40).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE

    assert "rope_theta" in hugging_face.old_spelling(folder)
    assert torch.equal(hugging_face.logits(folder, tokens), expected)
    assert traced.model(folder).spec == opened.spec


@pytest.mark.parametrize("family", ["mistral", "phi3"])
@pytest.mark.parametrize("window", [1, 5, 39, 40, 200])
def test_every_window_is_that_of_transformers(family, window, tmp_path, hugging_face, traced):
    config = {"mistral": MISTRAL, "phi3": PHI3}[family] | {"num_hidden_layers": 1}
    config |= {"sliding_window": window, "num_key_value_heads": 3}
    folder = hugging_face.save(tmp_path, config)
    tokens = traced.tokens(40, config["vocab_size"])
    expected = hugging_face.logits(folder, tokens)
    opened = traced.model(folder)
    assert opened.spec.window == window
    ours = traced.session(opened, 64).logits(tokens)
    # Even the one pair of tokens that a window of 39 parts in 40 tokens stands out here.
    assert traced.difference(ours, expected) < 1e-5
    unlimited = hugging_face.logits(folder, tokens, sliding_window=None)
    assert (traced.difference(unlimited, expected) > 1e-4) == (window < 40)


def test_longrope_sets_follow_the_declared_context(tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, PHI3 | LONGROPE | {"num_attention_heads": 3})
    tokens = traced.tokens(50, PHI3["vocab_size"])
    rope = LONGROPE["rope_parameters"]
    opened = traced.model(folder)

    # transformers chooses by the length of the text, so texts on one side of 32 tokens agree
    # as they are; for a short text in a long context its short set is replaced.
    long_only = dict(rope, short_factor=rope["long_factor"])
    short = hugging_face.logits(folder, tokens[:30])
    long = hugging_face.logits(folder, tokens)
    short_text_long_set = hugging_face.logits(folder, tokens[:30], rope_parameters=long_only)
    assert traced.difference(short, short_text_long_set) > 100 * traced.TOLERANCE

    declared_short, declared_long = traced.session(opened, 32), traced.session(opened, 128)
    for session, count, expected in (
        (declared_short, 30, short),
        (declared_long, 50, long),
        (declared_long, 30, short_text_long_set),
    ):
        ours = session.logits(tokens[:count])
        assert traced.difference(ours, expected) < traced.TOLERANCE

    # Growing past the original context, token by token, the cache holds one set throughout.
    declared_long.reset()
    grown = [declared_long.extend(tokens[i : i + 1]) for i in range(50)]
    assert traced.difference(np.concatenate(grown), long) < traced.TOLERANCE


@pytest.mark.parametrize(
    ("field", "value"), [("factor", 9.0), ("attention_factor", 1.7), ("factor", 0.5)]
)
def test_longrope_scales_given_in_the_file_are_used(field, value, tmp_path, hugging_face, traced):
    rope = LONGROPE["rope_parameters"] | {field: value}
    folder = hugging_face.save(tmp_path, PHI3 | LONGROPE | {"rope_parameters": rope})
    tokens = traced.tokens(20, PHI3["vocab_size"])
    ours = traced.session(traced.model(folder), 32).logits(tokens)
    assert traced.difference(ours, hugging_face.logits(folder, tokens)) < traced.TOLERANCE


def test_partial_rotary_longrope_as_in_phi_4_mini(tmp_path, hugging_face, traced):
    rope = LONGROPE["rope_parameters"] | {
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + i for i in range(6)],
        "long_factor": [2.0 + 3 * i for i in range(6)],
    }
    config = PHI3 | LONGROPE | {"rope_parameters": rope, "hidden_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    folder = hugging_face.save(tmp_path, config)
    expected = [hugging_face.logits(folder, traced.tokens(n, 83)) for n in (20, 60)]
    hugging_face.old_spelling(folder)
    opened = traced.model(folder)
    assert opened.spec.rope.width == 12
    for context, n, logits in zip((32, 100), (20, 60), expected, strict=True):
        ours = traced.session(opened, context).logits(traced.tokens(n, 83))
        assert traced.difference(ours, logits) < traced.TOLERANCE


# Fields that transformers' class wants as numbers, and that no file leaves null.
NOT_NULL = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "lfm2", "ministral3", "stablelm")),
    **dict.fromkeys(("mistral", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe")),
    **dict.fromkeys(("jetmoe", "qwen3_5_text")),
}


@pytest.mark.parametrize("style", ["absent", "null"])
@pytest.mark.parametrize(
    "family",
    sorted(
        FAMILIES.keys()
        - {"gemma3", "granitemoehybrid", "minicpm", "mistral3", "openelm"}
        - {"qwen3_5", "rwkv5", "rwkv6"}
    ),
)
def test_what_a_file_leaves_out_is_what_transformers_assumes(family, style):
    from transformers import AutoConfig

    needed = {
        "hidden_size": 512,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "vocab_size": 300_000,
    }
    given = dict(needed)
    if style == "null":
        given["sliding_window"] = None
        if family not in NOT_NULL:
            given["num_key_value_heads"] = None
    theirs = AutoConfig.for_model(family, **given)
    spec = read_spec({"model_type": family, **given})
    assert spec.max_context == theirs.max_position_embeddings
    assert spec.tied == theirs.tie_word_embeddings
    eps = {"phi": "layer_norm_eps", "stablelm": "layer_norm_eps", "lfm2": "norm_eps"}
    # OLMo 1 has a constant, which is no field.
    assert spec.norm_eps == getattr(theirs, eps.get(family, "rms_norm_eps"), 1e-5)
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None) or 0
    slides = ["sliding_attention"] * 4 if kinds is None else kinds
    turned = getattr(theirs, "no_rope_layers", [1] * 4)
    head_dim = getattr(theirs, "head_dim", None) or 16
    for layer, kind, turns in zip(spec.layers, slides, turned, strict=True):
        if kind == "linear_attention":
            assert (layer.mixer, layer.rope) == ("delta_net", None)
            continue
        assert layer.num_kv_heads == theirs.num_key_value_heads
        assert layer.window == (window if kind == "sliding_attention" else 0)
        assert (layer.rope is not None) == bool(turns)
    assert spec.head_dim == head_dim
    ropes = theirs.rope_parameters
    by_kind = "full_attention" in ropes
    full = ropes["full_attention"] if by_kind else ropes
    assert spec.rope.theta == full["rope_theta"]
    assert spec.rope.width == int(head_dim * full.get("partial_rotary_factor", 1.0))
    if by_kind:
        assert spec.ropes[1].theta == ropes["sliding_attention"]["rope_theta"]
    for ours, name in (
        (spec.attention_softcap, "attn_logit_softcapping"),
        (spec.logit_softcap, "final_logit_softcapping"),
    ):
        assert ours == (getattr(theirs, name, None) or 0.0)
    if hasattr(theirs, "query_pre_attn_scalar"):
        assert spec.scale == theirs.query_pre_attn_scalar**-0.5


def test_longrope_without_an_original_context_takes_the_familys(tmp_path):
    from transformers import Phi3Config

    from edgeforge.model.rope import inverse_frequencies

    scaling = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    fields = {
        "hidden_size": 12,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16384,
        "vocab_size": 32064,
    }
    rope = read_spec({"model_type": "phi3", **fields, "rope_scaling": scaling}).rope
    theirs = Phi3Config(**fields, rope_scaling=dict(scaling)).rope_parameters
    assert rope.original_context == theirs["original_max_position_embeddings"] == 4096
    assert rope.attention_factor == pytest.approx((1 + 2 / 12) ** 0.5)
    assert inverse_frequencies(rope, 5000)[0] == 0.5


def test_no_released_type_of_another_model_is_taken_for_a_misspelt_family():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from edgeforge.errors import CheckpointError

    others = {*CONFIG_MAPPING_NAMES, "phi4", "phi3_v", "phi3small", "llama-4"} - set(FAMILIES)
    assert {"deepseek_v3", "llama4", "llava", "minimax"} <= others
    for kind in others:
        with pytest.raises(CheckpointError) as caught:
            read_spec({"model_type": kind})
        assert "did you mean" not in str(caught.value), kind


@pytest.mark.parametrize("outside", [None, 64])
def test_the_original_context_in_the_section_is_read_as_transformers_does(outside):
    from transformers import AutoConfig

    field = "original_max_position_embeddings"
    inside = 32 if outside is None else outside
    scaling = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    for family, default in (("phi3", 4096), ("llama", 32)):
        fields = {
            "hidden_size": 12,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16384,
            "vocab_size": 32064,
            "rope_scaling": {**scaling, field: inside},
        }
        if outside is not None:
            fields[field] = outside
        theirs = AutoConfig.for_model(
            family, **dict(fields, rope_scaling=dict(scaling, **{field: inside}))
        )
        theirs.standardize_rope_params()
        rope = read_spec({"model_type": family, **fields}).rope
        assert rope.original_context == theirs.rope_parameters[field]
        assert rope.original_context == (outside or default)
