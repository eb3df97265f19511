"""Configurations of released models, as others' repositories hold them, are read or refused.

`configurations.json` has them with their dimensions made small, each with the repository and file
that it was read from; fields, flags and spellings are the original's.
"""

import json
from pathlib import Path

import pytest
import torch

from edgeforge.errors import CheckpointError
from edgeforge.families.registry import FAMILIES, read_spec
from edgeforge.model.stored_names import named_as_stored

pytestmark = pytest.mark.usefixtures("one_thread")

FOUND = json.loads((Path(__file__).parent / "configurations.json").read_text())
CONFIGS = {name: found["config"] for name, found in FOUND.items()}
OURS = [name for name in CONFIGS if CONFIGS[name]["model_type"] in FAMILIES]
# Why a configuration of a family that is read is refused all the same.
REFUSED = {
    "et__gemma3_1b_it": "'sliding_window_attention_size' to 512",  # read by no implementation
    "ome__e5_mistral_7b": "no head of a causal language model",
    "ome__gte_qwen2_7b": "sets is_causal to false",
    "ome__tiny-random-PhiModel__config": "no head of a causal language model",
}
READ = [name for name in OURS if name not in REFUSED]
# The first of each family whose released files spell things otherwise than transformers 5 does.
COMPARED = (
    *("aic__Qwen--Qwen3-0.6B", "et__Qwen2.5-0.5B-Instruct", "idx__SmolLM3-3B"),
    *("idx__granite-3.x-8b", "ome__gemma3", "ome__gemma3_text", "ome__gemma_2_9b"),
    *("ome__gemma_7b", "ome__stablelm_3b", "tt__LFM2-1.2B-text", "tt__Olmo-3.1-32B"),
    *("ome__mixtral", "ome__phimoe", "ome__qwen3_30b", "aic__Qwen--Qwen3.5-27B"),
    "idx__granite-4-hybrid-tiny",
)


def test_every_configuration_says_where_it_was_read():
    assert len(FOUND) == 98
    assert all(found["source"] for found in FOUND.values())


@pytest.mark.parametrize("name", READ)
def test_a_released_configuration_is_read(name):
    spec = read_spec(CONFIGS[name])
    assert spec.model_type == CONFIGS[name]["model_type"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_for_what_it_is(name):
    with pytest.raises(CheckpointError) as caught:
        read_spec(CONFIGS[name])
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in OURS])
def test_another_model_is_refused_by_its_type_without_a_hint(name):
    with pytest.raises(CheckpointError) as caught:
        read_spec(CONFIGS[name])
    assert f"model_type {CONFIGS[name]['model_type']!r}" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def released(name: str) -> dict:
    fields = dict(CONFIGS[name])
    for field in ("auto_map", "quantization_config"):
        fields.pop(field, None)
    return fields


@pytest.mark.parametrize("name", [n for n in READ if CONFIGS[n]["model_type"] != "openelm"])
def test_tensor_names_and_shapes_are_those_of_transformers(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = released(name)
    spec = read_spec(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config())
    theirs = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    if spec.tied:
        del theirs["lm_head.weight"]
    # In memory, transformers stacks the experts of a layer.
    held = named_as_stored(spec, theirs) if spec.mixture else spec
    ours = {p.tensor: p.tensor_shape for weight in held.weights.values() for p in weight.pieces}
    prefix = "language_model." if spec.model_type in ("gemma3", "qwen3_5") else ""
    assert ours == {prefix + tensor: shape for tensor, shape in theirs.items()}


@pytest.mark.parametrize("name", COMPARED)
def test_float_logits_of_a_released_configuration(name, tmp_path, hugging_face, traced):
    config = released(name)
    folder = hugging_face.save(tmp_path, config, config.get("torch_dtype", "bfloat16"))
    # As released, not as transformers writes it now.
    (folder / "config.json").write_text(json.dumps(config))
    tokens = traced.tokens(40, 96)
    expected = hugging_face.logits(folder, tokens)
    ours = traced.session(traced.model(folder), 48).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE
