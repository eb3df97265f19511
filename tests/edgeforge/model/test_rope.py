"""Rotary frequencies and tables against transformers and plain complex arithmetic."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgeforge.families.registry import read_spec
from edgeforge.families.spec import RopeSpec
from edgeforge.model.rope import inverse_frequencies, tables, uses_long_set
from edgeforge.synth.synthesise import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")

SCALED = [name for name, preset in PRESETS.items() if preset.config.get("rope_scaling")]


def transformers_frequencies(config, seq_len=None):
    fields = json.loads(json.dumps(dict(config)))  # transformers edits what it is given
    theirs = AutoConfig.for_model(fields.pop("model_type"), **fields)
    kind = theirs.rope_parameters["rope_type"]
    parameters = theirs.rope_parameters
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=seq_len)
    if "long_mscale" in parameters:  # Phi-3.5's mixture states the factor itself
        is_long = (seq_len or 0) > parameters["original_max_position_embeddings"]
        scale = parameters["long_mscale" if is_long else "short_mscale"]
    return frequencies.double(), scale


@pytest.mark.parametrize("preset", SCALED)
def test_frequencies_of_released_models(preset):
    config = PRESETS[preset].config
    rope = read_spec(config).rope
    contexts = [rope.original_context, rope.original_context + 1]
    for context in contexts:
        expected, scale = transformers_frequencies(config, context)
        torch.testing.assert_close(
            inverse_frequencies(rope, context), expected, rtol=1e-6, atol=0.0
        )
        assert rope.attention_factor == pytest.approx(scale, rel=1e-12)
        long = rope.scaling == "longrope" and context > rope.original_context
        assert uses_long_set(rope, context) == long
    same = torch.equal(*(inverse_frequencies(rope, context) for context in contexts))
    assert same == (rope.scaling != "longrope")


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(1, 40),
    theta=st.floats(100, 1e6),
    factor=st.floats(1, 64),
    low=st.floats(0.5, 4),
    spread=st.floats(0.1, 8),
    original=st.integers(16, 16384),
)
def test_llama3_rule_at_any_setting(half, theta, factor, low, spread, original):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + spread,
        "original_max_position_embeddings": original,
    }
    config = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 2 * half,
        "max_position_embeddings": 32768,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    ours = inverse_frequencies(read_spec(config).rope, 32)
    torch.testing.assert_close(ours, transformers_frequencies(config)[0], rtol=3e-5, atol=0.0)


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(1, 16),
    theta=st.floats(2, 1e6),
    factor=st.floats(0.5, 8),
    context=st.integers(1, 300),
)
def test_tables_turn_each_pair_by_its_frequency(half, theta, factor, context):
    rope = RopeSpec(theta, 2 * half, "linear", factor=factor)
    cos, sin = tables(rope, context)
    assert cos.dtype == sin.dtype == torch.float32
    pairs = np.arange(half)
    angles = np.arange(context)[:, None] / factor * theta ** (-pairs / half)
    np.testing.assert_allclose(cos.numpy() + 1j * sin.numpy(), np.exp(1j * angles), atol=1e-6)


def test_tables_stay_exact_at_far_positions():
    # At position 131071 an angle held in float32 would be off by up to 0.004.
    rope = RopeSpec(10000.0, 4)
    cos, sin = tables(rope, 131072)
    for pair, frequency in enumerate((1.0, 0.01)):
        assert cos[-1, pair].item() == pytest.approx(math.cos(131071 * frequency), abs=1e-7)
        assert sin[-1, pair].item() == pytest.approx(math.sin(131071 * frequency), abs=1e-7)


def test_longrope_stretches_both_tables():
    rope = RopeSpec(100.0, 2, "longrope", 1.0, 1.0, 1.0, 8, (1.0,), (4.0,), 1.25)
    for context, divisor in ((8, 1), (9, 4)):
        cos, sin = tables(rope, context)
        angle = 3 / divisor
        assert cos[3, 0].item() == pytest.approx(1.25 * math.cos(angle))
        assert sin[3, 0].item() == pytest.approx(1.25 * math.sin(angle))
