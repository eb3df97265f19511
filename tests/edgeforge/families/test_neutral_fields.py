"""Fields that may have one value only, and models that are no causal language models."""

import pytest

from edgeforge.errors import CheckpointError
from edgeforge.families.registry import read_spec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 16}
OPENELM = {
    "model_type": "openelm",
    "model_dim": 48,
    "head_dim": 8,
    "num_transformer_layers": 4,
    "ffn_dim_divisor": 16,
}
FAMILIES = [LLAMA, MISTRAL, OPENELM]


def refusal(config, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_spec(config, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name",
    [
        "LlamaBidirectionalModel",
        "LlamaBidirectionalForCausalLM",
        "LlamaForRewardModel",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
        "LlamaModel",
        "MistralModel",
        "LlavaForConditionalGeneration",
    ],
)
@pytest.mark.parametrize("config", FAMILIES)
def test_an_architecture_without_a_causal_head_is_refused_by_name(config, name):
    message = refusal(config | {"architectures": [name]})
    assert f"names the architecture {name}," in message
    assert "no head of a causal language model" in message
    assert read_spec(config | {"architectures": [name]}, ignore=["architectures"])


@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        ["LlamaForCausalLM"],
        ["LLaMAForCausalLM"],
        ["QWenLMHeadModel"],
        ["LlamaModel", "LlamaForCausalLM"],
        "LlamaForCausalLM",
    ],
)
@pytest.mark.parametrize("config", FAMILIES)
def test_a_causal_head_or_no_architecture_is_read(config, names):
    assert read_spec(config | {"architectures": names}) == read_spec(config)


@pytest.mark.parametrize("names", [3, {"a": 1}, [3], ["LlamaForCausalLM", None]])
def test_architectures_that_are_no_names_are_refused(names):
    assert "architectures is not a list of names" in refusal(LLAMA | {"architectures": names})


@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize("field", ["is_causal", "causal", "use_causal_mask"])
def test_attention_that_looks_ahead_is_refused_by_name(config, field):
    message = refusal(config | {field: False})
    assert f"sets {field} to false" in message and f"--ignore-config {field}" in message
    assert read_spec(config | {field: True}) == read_spec(config)
    assert read_spec(config | {field: False}, ignore=[field]) == read_spec(config)


@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("cross_attention_hidden_size", 48),
        ("pruned_heads", {"0": [1]}),
        ("use_bidirectional_attention", True),
        ("use_rope", False),
        ("scale_attn_weights", False),
    ],
)
def test_other_models_are_refused_by_name(config, field, value):
    assert f"sets {field!r} to {value!r}" in refusal(config | {field: value})
    assert read_spec(config | {field: not value}) == read_spec(config)


@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize(
    ("field", "neutral"),
    [
        ("attention_multiplier", 8**-0.5),
        ("attention_multiplier", 0.35355339),
        ("query_pre_attn_scalar", 8),
        ("dim_model_base", 48),
        ("scale_depth", 2.0),
        ("scale_emb", 1),
        ("embedding_multiplier", 1.0),
        ("residual_multiplier", 1.0),
        ("logits_scaling", 1.0),
        ("logit_scale", 1),
        ("rotary_pct", 1.0),
    ],
)
def test_a_factor_passes_at_the_value_that_changes_nothing(config, field, neutral):
    assert read_spec(config | {field: neutral}) == read_spec(config)
    for other in (neutral * 1.01, 0, True, "1"):
        assert f"sets {field!r} to {other!r}" in refusal(config | {field: other})


def test_kinds_of_layers_pass_where_all_are_what_the_model_computes():
    full, sliding = ["full_attention"] * 4, ["sliding_attention"] * 4
    assert read_spec(LLAMA | {"layer_types": full}) == read_spec(LLAMA)
    assert read_spec(MISTRAL | {"layer_types": sliding}) == read_spec(MISTRAL)
    no_window = MISTRAL | {"sliding_window": None}
    assert read_spec(no_window | {"layer_types": full}) == read_spec(no_window)
    for config, kinds in (
        (LLAMA, sliding),
        (LLAMA, full[1:]),
        (LLAMA, [*full[1:], "sliding_attention"]),
        (MISTRAL, full),
        (MISTRAL, [*sliding[1:], "full_attention"]),
    ):
        assert "sets 'layer_types'" in refusal(config | {"layer_types": kinds})
