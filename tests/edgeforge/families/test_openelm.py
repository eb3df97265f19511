"""OpenELM: logits against NumPy written from the paper; dimensions against the released models."""

import pytest

from edgeforge.errors import CheckpointError
from edgeforge.families.registry import read_spec
from edgeforge.synth.synthesise import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {
    "model_type": "openelm",
    "activation_fn_name": "swish",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_dim_divisor": 8,
    "ffn_with_glu": True,
    "head_dim": 6,
    "max_context_length": 64,
    "model_dim": 30,
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "num_transformer_layers": 3,
    "rope_freq_constant": 500,
    "rope_max_length": 128,
    "share_input_output_layers": True,
    "vocab_size": 71,
}
CASES = {
    "lists given, uneven and odd": BASE
    | {
        "num_query_heads": [3, 5, 9],
        "num_kv_heads": [1, 5, 3],
        "ffn_multipliers": [0.5, 1.73, 4.0],
        "ffn_dim_divisor": 1,
    },
    "lists computed from pairs": BASE
    | {
        "num_gqa_groups": 3,
        "model_dim": 96,
        "num_transformer_layers": 4,
        "qkv_multipliers": [0.5, 1.0],
        "ffn_multipliers": [0.5, 4.0],
    },
    "lists computed from numbers, by layer for the feed-forward part": BASE
    | {"num_gqa_groups": 2, "qkv_multipliers": 1.5, "ffn_multipliers": [1.1, 2.2, 0.3]},
    "all left out": {
        field: value
        for field, value in BASE.items()
        if field not in ("normalize_qk_projections", "share_input_output_layers", "ffn_with_glu")
    },
    "untied, normalised": BASE | {"share_input_output_layers": False},
    "tied, not normalised": BASE | {"normalize_qk_projections": False},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_paper(case, tmp_path, openelm_numpy, traced):
    config = CASES[case]
    stored = openelm_numpy.save(tmp_path, config, openelm_numpy.random_tensors(config))
    tokens = traced.tokens(40, config["vocab_size"])
    opened = traced.model(tmp_path)
    ours = traced.session(opened, 48).logits(tokens)
    expected = openelm_numpy.logits(config, stored, tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE
    layers = [(x.num_heads, x.num_kv_heads, x.ffn_width) for x in opened.spec.layers]
    assert layers == openelm_numpy.layer_dimensions(config)
    assert opened.spec.num_parameters == sum(tensor.size for tensor in stored.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_stored_dtype_in_several_shards(dtype, tmp_path, openelm_numpy, traced):
    config = CASES["lists given, uneven and odd"]
    tensors = openelm_numpy.random_tensors(config, seed=5)
    stored = openelm_numpy.save(tmp_path, config, tensors, dtype, shards=3)
    tokens = traced.tokens(20, config["vocab_size"], seed=1)
    opened = traced.model(tmp_path)
    assert len(opened.checkpoint.files) == 3
    ours = traced.session(opened, 20).logits(tokens)
    expected = openelm_numpy.logits(config, stored, tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE
    if dtype != "float32":  # the rounding of the file is seen, so the tolerance is no blindfold
        exact = openelm_numpy.logits(config, tensors, tokens)
        assert traced.difference(expected, exact) > traced.TOLERANCE


# Layers, width, head width, query heads and parameters as released; the key/value heads are a
# quarter of the query heads, and the cache of one token takes so many bytes in float16.
RELEASED = {
    "openelm-270m": (1280, 64, [12] * 5 + [16] * 7 + [20] * 4, 271_527_168, 16_128),
    "openelm-450m": (1536, 64, [12] * 3 + [16] * 7 + [20] * 6 + [24] * 4, 457_179_136, 23_296),
    "openelm-1.1b": (
        2048,
        64,
        [16] * 3 + [20] * 7 + [24] * 8 + [28] * 6 + [32] * 4,
        1_079_891_456,
        43_264,
    ),
    "openelm-3b": (
        3072,
        128,
        [12] * 4 + [16] * 14 + [20] * 12 + [24] * 6,
        3_036_647_424,
        83_968,
    ),
}


@pytest.mark.parametrize("lists", ["computed", "given"])
@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name, lists, openelm_numpy):
    hidden, head_dim, heads, parameters, cache_bytes = RELEASED[name]
    config = dict(PRESETS[name].config)
    if lists == "computed":
        del config["num_query_heads"], config["num_kv_heads"]
        config["ffn_multipliers"] = [0.5, 4.0]
    spec = read_spec(config)
    assert (spec.hidden_size, spec.head_dim) == (hidden, head_dim)
    assert [layer.num_heads for layer in spec.layers] == heads
    assert [layer.num_kv_heads for layer in spec.layers] == [count // 4 for count in heads]
    assert spec.num_parameters == parameters
    assert sum(x.num_kv_heads for x in spec.layers) * head_dim * 4 == cache_bytes
    widths = [layer.ffn_width for layer in spec.layers]
    assert widths == [width for _, _, width in openelm_numpy.layer_dimensions(config)]
    assert all(width % 128 == 0 for width in widths)


def test_released_feed_forward_widths():
    widths = [layer.ffn_width for layer in read_spec(PRESETS["openelm-270m"].config).layers]
    assert widths == [
        *(768, 1024, 1280, 1536, 1792, 2048, 2560, 2816),
        *(3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_query_heads": [3, 4, 9], "num_kv_heads": [1, 3, 3]},
            ["layer 1", "4 query", "3 key"],
        ),
        ({"num_query_heads": [3, 4]}, ["num_query_heads", "3 numbers"]),
        ({"num_query_heads": [3, 0, 3]}, ["num_query_heads[1] is 0"]),
        ({"num_query_heads": 12}, ["num_query_heads", "3 numbers"]),
        ({"qkv_multipliers": [0.5, 0.6, 0.7, 1.0]}, ["qkv_multipliers", "4 numbers", "3 layers"]),
        ({"ffn_multipliers": [1, 2, 3, 4, 5]}, ["ffn_multipliers", "5 numbers", "3 layers"]),
        ({"ffn_multipliers": ["wide", 2, 3]}, ["ffn_multipliers[0]", "'wide'"]),
        ({"num_query_heads": [1, 1, 1], "num_gqa_groups": 2}, ["layer 0", "1 query"]),
        ({"ffn_with_glu": False}, ["ffn_with_glu is false"]),
        ({"activation_fn_name": "gelu"}, ["activation_fn_name", "'gelu'", "'swish'"]),
        ({"normalization_layer_name": "layer_norm"}, ["normalization_layer_name", "'rms_norm'"]),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["'rope_scaling'", "--ignore-config"],
        ),
        ({"rope_freq_constant": 0}, ["rope_freq_constant is 0"]),
        ({"head_dim": 7}, ["7", "even"]),
    ],
)
def test_what_is_not_openelm_is_refused_by_name(change, words):
    with pytest.raises(CheckpointError) as caught:
        read_spec(BASE | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
