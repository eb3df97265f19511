"""A configuration is understood whole or refused by name: nothing that matters is ignored."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeforge.errors import CheckpointError
from edgeforge.families.registry import FAMILIES, read_spec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
MISTRAL = LLAMA | {"model_type": "mistral"}
PHI3 = LLAMA | {"model_type": "phi3"}
OPENELM = {
    "model_type": "openelm",
    "model_dim": 48,
    "head_dim": 8,
    "num_transformer_layers": 2,
    "ffn_dim_divisor": 16,
}
RWKV = {"vocab_size": 100, "hidden_size": 48, "head_size": 8, "num_hidden_layers": 2}
MINICPM = {"model_type": "minicpm", "scale_emb": 10, "scale_depth": 1.4, "dim_model_base": 24}
NO_RMS_NORM = {field: value for field, value in LLAMA.items() if field != "rms_norm_eps"}
LIKE_LLAMA = ("gemma", "gemma2", "gemma3", "gemma3_text", "granite", "minicpm", "ministral3")
LIKE_LLAMA += ("olmo2", "olmo3", "qwen2", "qwen3", "qwen3_5", "qwen3_5_text", "smollm3")
MIXTURES = ("granitemoe", "jetmoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe")
GRANITES = ("granite", "granitemoe", "granitemoehybrid")
BY_FAMILY = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral3": MISTRAL | {"model_type": "mistral3"},
    "openelm": OPENELM,
    "phi3": PHI3,
    **{family: LLAMA | {"model_type": family} for family in (*LIKE_LLAMA, *MIXTURES)},
    **{family: NO_RMS_NORM | {"model_type": family} for family in ("lfm2", "olmo", "phi")},
    "stablelm": NO_RMS_NORM | {"model_type": "stablelm"},
    **{family: RWKV | {"model_type": family} for family in ("rwkv5", "rwkv6")},
}
# Its layers are Mamba 2 where a file does not say otherwise.
BY_FAMILY["granitemoehybrid"] = LLAMA | {
    "model_type": "granitemoehybrid",
    "layer_types": ["attention", "mamba"],
    "mamba_n_heads": 4,
    "position_embedding_type": "rope",
}
# Its query heads are the key/value heads of each expert that a token chose.
BY_FAMILY["jetmoe"] |= {"num_experts_per_tok": 3}
BY_FAMILY["minicpm"] |= {"scale_emb": 10, "scale_depth": 1.4, "dim_model_base": 24}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def refusal(config, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_spec(config, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_family_has_a_configuration_here():
    assert set(BY_FAMILY) == set(FAMILIES)
    for config in BY_FAMILY.values():
        read_spec(config)


CHANGES_THE_MATHS = {
    "attention_multiplier": 0.125,
    "attn_logit_softcapping": 50.0,
    "clip_qkv": 8.0,
    "embedding_multiplier": 12.0,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "max_window_layers": 28,
    "num_local_experts": 8,
    "qk_layernorm": True,
    "residual_multiplier": 0.22,
    "some_future_field": "yes",
}


GEMMA = ("gemma2", "gemma3", "gemma3_text")
# Families that compute what the field says.
READ_BY = {
    "attention_multiplier": GRANITES,
    "attn_logit_softcapping": ("gemma2",),
    "clip_qkv": ("olmo", "olmoe"),
    "embedding_multiplier": GRANITES,
    "final_logit_softcapping": GEMMA,
    "layer_types": (*GEMMA, "olmo3"),
    "logits_scaling": GRANITES,
    "max_window_layers": ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    "num_local_experts": (*MIXTURES, "granitemoehybrid"),
    "residual_multiplier": GRANITES,
}


@pytest.mark.parametrize("field", READ_BY)
def test_a_field_is_refused_where_no_family_computes_it(field):
    for family in READ_BY[field]:
        spec = read_spec(BY_FAMILY[family] | {field: CHANGES_THE_MATHS[field]})
        changed = field != "max_window_layers"  # which says nothing while windows are off
        assert (spec != read_spec(BY_FAMILY[family] | {field: OTHER.get(field)})) == changed


OTHER = {
    "layer_types": ["full_attention", "sliding_attention"],
    "attn_logit_softcapping": 49.0,
    "final_logit_softcapping": 29.0,
    "num_local_experts": 16,
}


@pytest.mark.parametrize("family", BY_FAMILY)
@pytest.mark.parametrize("field", CHANGES_THE_MATHS)
def test_a_field_that_changes_the_maths_is_refused_unless_vouched_for(family, field):
    if family in READ_BY.get(field, ()):
        return
    value = CHANGES_THE_MATHS[field]
    config = BY_FAMILY[family] | {field: value}
    message = refusal(config)
    kinds = ("granitemoehybrid", "qwen2", "qwen2_moe", "qwen3", "smollm3", "lfm2")
    if field == "layer_types" and family in (*kinds, "qwen3_5", "qwen3_5_text"):
        # They read the field, and have no such kind of layer, or none in this configuration.
        assert "layer_types[0] is 'sliding_attention'" in message
        return
    assert f"{field!r} to {value!r}" in message
    assert f"--ignore-config {field}" in message
    assert read_spec(config, ignore=[field]) == read_spec(BY_FAMILY[family])
    assert field in refusal(config, ignore=["another"])
    assert read_spec(BY_FAMILY[family] | {field: None}) == read_spec(BY_FAMILY[family])


BIASED = {
    "attention_bias": ("qk_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_up_proj", "down_proj"),
}


@pytest.mark.parametrize("family", [each for each in BY_FAMILY if each != "openelm"])
@pytest.mark.parametrize("field", BIASED)
def test_a_bias_is_mapped_or_refused(family, field):
    reading = {"attention_bias": ("llama", *LIKE_LLAMA, "olmo"), "mlp_bias": ("llama", "granite")}
    reading["attention_bias"] += (*GRANITES[1:], "olmoe", "phimoe", "qwen3_moe")
    reading["mlp_bias"] += ("smollm3",)
    config = BY_FAMILY[family] | {field: True}
    if family.startswith("qwen3_5"):  # biases of its attention; a recurrence's steps have their own
        config |= {"full_attention_interval": 1}
        if field == "attention_bias":
            assert "model.layers.0.self_attn.gate_proj.bias" in read_spec(config).weights
            return
    if family in reading[field] and family not in ("minicpm", "ministral3", "qwen2"):
        biased = {n for n in read_spec(config).weights if n.endswith("_proj.bias")}
        names = {name.split(".")[-2] for name in biased} - {"dt_proj"}  # which always has one
        assert names == set(BIASED[field])
    else:
        assert f"{field!r} to True" in refusal(config)
    read_spec(BY_FAMILY[family] | {field: False})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"rope_interleaved": True}, ["'rope_interleaved'"]),
        (LLAMA | {"sliding_window": 128}, ["'sliding_window' to 128"]),
        (PHI3 | {"lm_head_bias": True}, ["'lm_head_bias'"]),
        (PHI3 | {"full_attn_mod": 2}, ["'full_attn_mod' to 2"]),
        (PHI3 | {"interpolate_factor": 2}, ["'interpolate_factor' to 2"]),
        (PHI3 | {"blocksparse_params": {"block_size": 64}}, ["'blocksparse_params'"]),
        (LLAMA | {"hidden_act": "relu"}, ["hidden_act", "'relu'", "'silu'", "'gelu'"]),
        (LLAMA | {"num_key_value_heads": 4}, ["6", "multiple", "4", "num_key_value_heads"]),
        (LLAMA | {"hidden_size": 50}, ["hidden_size 50", "num_attention_heads 6"]),
        (LLAMA | {"head_dim": 7}, ["head_dim 7", "even"]),
        (LLAMA | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "4 of 8"]),
        (MISTRAL | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "4 of 8"]),
        (PHI3 | {"partial_rotary_factor": 1.5}, ["partial_rotary_factor is 1.5", "(0, 1]"]),
        (PHI3 | {"partial_rotary_factor": 0.4}, ["3 rotated columns", "8"]),
        (PHI3 | {"partial_rotary_factor": 0.1}, ["0 rotated columns"]),
        (LLAMA | {"quantization_config": {"bits": 4}}, ["quantization_config", "already"]),
        (LLAMA | {"bos_token_id": 100}, ["bos_token_id is 100", "100 tokens"]),
        (LLAMA | {"eos_token_id": ["</s>"]}, ["eos_token_id", "'</s>'"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config, words):
    message = refusal(config)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "ntk", "factor": 4.0}, ["'ntk'", "llama3", "yarn", "longrope"]),
        ({"rope_type": "yarn"}, ["no field 'factor'"]),
        ({"type": "yarn", "factor": 4.0, "beta_fast": "32"}, ["beta_fast is '32'"]),
        ({"type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}, ["'llama_4_scaling_beta'"]),
        ({"type": "dynamic", "factor": 2.0}, ["'dynamic'", "linear"]),
        ({"rope_type": "proportional"}, ["'proportional'"]),
        ({"rope_type": "linear"}, ["no field 'factor'"]),
        ({"rope_type": "linear", "facto": 2.0}, ["no field 'factor'", "'facto'"]),
        ({"rope_type": "linear", "factor": -2.0}, ["factor is -2.0"]),
        ({"rope_type": "linear", "factor": "2"}, ["factor is '2'"]),
        ({"rope_type": "linear", "factor": float("nan")}, ["factor is nan"]),
        ({"rope_type": "default", "factor": 2.0}, ["'factor' to 2.0"]),
        ({"rope_type": "default", "mrope_section": [1, 1, 2]}, ["'mrope_section'"]),
        ({"full_attention": {"rope_type": "default"}}, ["'full_attention'"]),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4},
            ["original_max_position_embeddings"],
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 64,
            },
            ["low_freq_factor 4.0", "high_freq_factor 4.0"],
        ),
        ({**LONGROPE, "short_factor": [1.0] * 3}, ["short_factor", "4 numbers", "found 3"]),
        ({**LONGROPE, "long_factor": [1.0] * 5}, ["long_factor", "4 numbers", "found 5"]),
        ({**LONGROPE, "long_factor": [1.0, 1.0, 0.0, 1.0]}, ["long_factor[2] is 0.0"]),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4}, ["long_factor", "found none"]),
        ({**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2}, ["'short_mscale' to 1.1"]),
        ([1, 2], ["not an object"]),
    ],
)
def test_rope_that_is_not_implemented_is_refused(spelling, rope, words):
    message = refusal(PHI3 | {spelling: rope})
    assert all(word in message for word in [spelling, *words]), message


def test_two_spellings_of_the_same_rope_may_stand_together_but_not_disagree():
    linear = {"rope_type": "linear", "factor": 2.0}
    both = LLAMA | {"rope_parameters": linear, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read_spec(both).rope.factor == 2.0
    both["rope_scaling"] = {"type": "linear", "factor": 3.0}
    assert "contradict" in refusal(both)
    both["rope_parameters"] = {"rope_theta": 5.0}
    assert "contradict" in refusal(both)


def test_the_original_context_stands_beside_the_rope_and_not_in_it():
    field = "original_max_position_embeddings"
    outside = PHI3 | {field: 64, "rope_scaling": LONGROPE}
    inside = PHI3 | {"rope_scaling": LONGROPE | {field: 64}}
    assert read_spec(outside).rope.original_context == 64
    # transformers' class has the field beside the section, 4096 where the file has none.
    assert read_spec(inside).rope.original_context == 4096
    assert read_spec(inside | {field: 64}).rope == read_spec(outside).rope
    # Families without such a field have it in the section, or take their own context.
    assert read_spec(LLAMA | {"rope_scaling": LONGROPE | {field: 64}}).rope.original_context == 64
    assert read_spec(LLAMA | {"rope_scaling": LONGROPE}).rope.original_context == 256
    assert "64" in refusal(inside | {field: 128})
    assert field in refusal(PHI3 | {field: "64", "rope_scaling": LONGROPE})
    assert field in refusal(PHI3 | {field: 1, "rope_scaling": LONGROPE})


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "linear", "factor": 2.5}, 640),
        ({"type": "linear", "factor": 1.0}, 256),
        ({"type": "linear", "factor": 0.5}, 256),
        (LONGROPE, 256),
        (None, 256),
    ],
)
def test_linear_scaling_stretches_the_context_that_the_file_states(family, rope, context):
    assert read_spec(BY_FAMILY[family] | {"rope_scaling": rope}).max_context == context


METADATA = {
    "_flash_attn_2_enabled": True,
    "attention_dropout": 0.1,
    "classifier_dropout": 0.1,
    "internal_version": "x",
    "is_decoder": True,
    "model_name": "mine",
    "num_labels": 3,
    "tokenizer": "pretrained_fast",
    "tokenizer_model_max_length": 4096,
    "unsloth_fixed": True,
    "use_flash_attn": True,
    "use_flash_attention_2": True,
}


@pytest.mark.parametrize("family", BY_FAMILY)
def test_metadata_is_no_maths(family):
    for field, value in METADATA.items():
        assert read_spec(BY_FAMILY[family] | {field: value}) == read_spec(BY_FAMILY[family]), field


def test_metadata_of_a_rope_is_no_maths():
    rope = {"type": "linear", "factor": 4.0}
    marked = LLAMA | {"rope_scaling": rope | {"finetuned": True}}
    assert read_spec(marked) == read_spec(LLAMA | {"rope_scaling": rope})
    plain = LLAMA | {"rope_scaling": {"rope_type": "default", "factor": 1.0}}
    assert read_spec(plain) == read_spec(LLAMA)


@pytest.mark.parametrize("name", ["su", "longrope"])
def test_longrope_has_two_names(name):
    rope = {**LONGROPE, "type": name}
    del rope["rope_type"]
    assert read_spec(PHI3 | {"rope_scaling": rope}).rope.scaling == "longrope"


@pytest.mark.parametrize("family", BY_FAMILY)
@pytest.mark.parametrize("value", [None, "12", -1, 0, 1.5, True, [3], {}])
def test_wrong_types_and_missing_fields_name_the_field(family, value):
    config = BY_FAMILY[family]
    required = {
        "openelm": ["model_dim", "head_dim", "num_transformer_layers"],
        "rwkv5": ["hidden_size", "num_hidden_layers", "vocab_size"],
        "rwkv6": ["hidden_size", "num_hidden_layers", "vocab_size"],
    }.get(
        family,
        [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            *([] if family == "jetmoe" else ["num_attention_heads"]),
            "vocab_size",
        ],
    )
    for field in required:
        message = refusal(config | {field: value})
        assert repr(field) in message if value is None else f"{field} is {value!r}" in message
        without = {key: kept for key, kept in config.items() if key != field}
        assert f"no field {field!r}" in refusal(without)
        assert f"(it has '{field}s')" in refusal(without | {f"{field}s": 3})


@pytest.mark.parametrize("family", BY_FAMILY)
def test_numbers_that_no_model_has_are_refused_at_once(family):
    layers = "num_transformer_layers" if family == "openelm" else "num_hidden_layers"
    assert f"{layers} is 1000000000;" in refusal(BY_FAMILY[family] | {layers: 1_000_000_000})
    message = refusal(BY_FAMILY[family] | {"vocab_size": 10**4000})
    assert "vocab_size is 1000" in message
    assert len(message) < 300
    assert "vocab_size is [0, 0" in (message := refusal(LLAMA | {"vocab_size": [0] * 10**5}))
    assert len(message) < 300


def test_a_field_with_line_breaks_in_its_name_stays_on_one_line():
    assert r"'a\nb'" in refusal(LLAMA | {"a\nb": 1})


@pytest.mark.parametrize("field", ["tie_word_embeddings", "rms_norm_eps", "rope_theta", "head_dim"])
def test_optional_fields_are_checked_too(field):
    assert re.search(rf"{field} is \[\]", refusal(LLAMA | {field: []}))
    assert re.search(rf"{field} is 'x'", refusal(LLAMA | {field: "x"}))


@pytest.mark.parametrize("kind", ["lama", "Llama", "jamba", None, 3, ["llama"], ""])
def test_an_unknown_model_type_lists_the_known(kind):
    message = refusal(LLAMA | {"model_type": kind})
    assert repr(kind) in message
    assert f"reads {', '.join(FAMILIES)}" in message
    assert ("did you mean 'llama'" in message) == (kind in ("lama", "Llama", ["llama"]))
    assert "model_type None" in refusal({})


def test_ends_of_text_are_gathered_from_both_files():
    config = LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1}
    spec = read_spec(config, {"eos_token_id": [7, 8, 2], "bos_token_id": 3})
    assert (spec.bos, spec.eos, spec.pad) == (3, (7, 8, 2), None)
    assert read_spec(config).eos == (2,)
    nameless = read_spec(LLAMA | {"bos_token_id": None})
    assert (nameless.bos, nameless.eos, nameless.pad) == (None, (), None)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), family=st.sampled_from(sorted(BY_FAMILY)))
def test_no_value_of_any_field_is_more_than_refused(data, family):
    config = dict(BY_FAMILY[family])
    rope = {"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 4}
    known = [*config, "rope_scaling", "rope_parameters", "rope_theta", "eos_token_id"]
    known += ["head_dim", "tie_word_embeddings", "num_query_heads", "qkv_multipliers"]
    config[data.draw(st.sampled_from(known))] = data.draw(JSON)
    if family != "openelm" and data.draw(st.booleans()):
        config["rope_scaling"] = rope | {data.draw(st.sampled_from(list(rope))): data.draw(JSON)}
    try:
        spec = read_spec(config)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert spec.rope.width > 0
        assert spec.num_parameters > 0
