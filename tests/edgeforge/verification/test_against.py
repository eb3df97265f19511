"""FLOAT held against transformers, which loads the same checkpoint; and FLOATs that are wrong."""

from __future__ import annotations

import pytest

from edgeforge.errors import UsageError
from edgeforge.families.registry import FAMILIES
from edgeforge.verification.against import check_against
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from tests.oracles import tiny_families

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
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
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
CONFIGS = {
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 16},
    "phi3": LLAMA | {"model_type": "phi3", "sliding_window": None, "pad_token_id": None} | LONGROPE,
    "gemma": tiny_families.CONFIGS["gemma"],  # whose stored dtype rounds a factor
    "mistral3": {  # which transformers does not count as a model of texts alone
        "model_type": "mistral3",
        "text_config": LLAMA | {"model_type": "mistral", "sliding_window": None},
        "tie_word_embeddings": False,
        "vision_config": tiny_families.PIXTRAL,
    },
}

# Held against transformers in tests/edgeforge/families, by the same reference.
ELSEWHERE = {
    *(*tiny_families.CONFIGS, *tiny_families.MIXTURES, *tiny_families.RECURRENT),
    *("gemma3", "qwen3_5"),
}
WITHOUT = {"minicpm", "openelm", "rwkv5", "rwkv6"}


def held(folder, traced, context=64, length=40, **changed):
    model = traced.model(folder)
    blocks = [traced.tokens(length, 83).tolist()]
    judge = traced.model(changed["other"]) if changed else model
    return check_against("transformers", model, context, blocks, traced.runner(judge, context))


def test_every_family_of_transformers_is_looked_at():
    assert CONFIGS.keys() | ELSEWHERE | WITHOUT == FAMILIES.keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_float_is_what_transformers_computes(family, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, CONFIGS[family], "bfloat16")
    found = held(folder, traced)
    assert found.verdict == "passed" and found.value < 1e-5
    assert found.name == "against.transformers"


@pytest.mark.parametrize("context", [32, 64])
def test_longrope_takes_the_set_of_the_declared_context(context, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, CONFIGS["phi3"])
    assert held(folder, traced, context, length=20).value < 1e-5


@pytest.mark.parametrize(
    "wrong", [{"rms_norm_eps": 1e-2}, {"rope_theta": 500.0, "rope_parameters": None}]
)
def test_a_float_that_is_wrong_fails(wrong, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path / "right", LLAMA)
    other = hugging_face.save(tmp_path / "wrong", LLAMA)
    hugging_face.set_config(other, **wrong)
    found = held(folder, traced, other=other)
    assert found.verdict == "failed"
    assert "against.transformers is" in found.message and "worst: token" in found.message


def test_a_family_that_transformers_does_not_have_is_refused(tmp_path, openelm_numpy, traced):
    config = {
        "model_type": "openelm",
        "model_dim": 40,
        "head_dim": 8,
        "num_transformer_layers": 1,
        "num_query_heads": [3],
        "num_kv_heads": [1],
        "ffn_dim_divisor": 4,
        "ffn_multipliers": [0.7],
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "vocab_size": 83,
    }
    openelm_numpy.save(tmp_path, config, openelm_numpy.random_tensors(config))
    with pytest.raises(UsageError, match="transformers has no openelm without code"):
        held(tmp_path, traced)


def test_another_program_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="--against 'vllm' is not possible; there is transformers"):
        verify(tmp_path, VerifyOptions(against="vllm"))
