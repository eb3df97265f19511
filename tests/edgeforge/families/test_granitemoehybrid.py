"""Granite 4's hybrids against transformers, in every form, and what does not fit together."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge.errors import CheckpointError
from edgeforge.families.registry import read_spec
from edgeforge.synth.synthesise import PRESETS
from tests.oracles.tiny_families import RECURRENT, VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RECURRENT["granitemoehybrid"]
DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}
ROPE = {"position_embedding_type": "rope", "rope_parameters": {"rope_theta": 100.0}}

VARIANTS = {
    "a mixture without positions": {},
    "dense, with positions": DENSE | ROPE,
    "four heads of queries and keys": DENSE | {"mamba_n_groups": 4, "mamba_d_state": 5},
    "a mixture with positions, two heads of queries and keys": ROPE | {"mamba_n_groups": 2},
    "all biases": DENSE | {"mamba_proj_bias": True, "attention_bias": True},
    "no bias at all, untied": {"mamba_conv_bias": False, "tie_word_embeddings": False},
    "recurrent layers alone, three tokens convolved": DENSE
    | {"layer_types": ["linear_attention"] * 3, "mamba_d_conv": 3},
    "attention alone, with positions": DENSE | ROPE | {"layer_types": ["full_attention"] * 3},
    "awkward widths": DENSE
    | {"hidden_size": 60, "mamba_n_heads": 6, "mamba_expand": 3, "num_attention_heads": 5}
    | {"num_key_value_heads": 1, "shared_intermediate_size": 37, "mamba_d_state": 7},
}


def with_long_memories(folder):
    """Steps from 0.001 to 0.1 and decays of 1 to as many as heads, as released models have them.

    Random numbers would make a model that forgets everything within three tokens.
    """
    held = load_file(folder / "model.safetensors")
    for name, tensor in held.items():
        heads = len(tensor)
        if name.endswith("dt_bias"):
            tensor.copy_(torch.logspace(-3, -1, heads).expm1().log())
        elif name.endswith("A_log"):
            tensor.copy_(torch.arange(1, heads + 1).log())
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_the_logits_of_transformers(variant, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, CONFIG | VARIANTS[variant])
    tokens = traced.tokens(40, VOCAB)
    short = hugging_face.logits(folder, tokens)
    with_long_memories(folder)
    expected = hugging_face.logits(folder, tokens)
    session = traced.session(traced.model(folder), 48)
    assert traced.difference(session.logits(tokens), expected) < 5e-6
    session.reset()
    parts = [tokens[:3], *np.split(tokens[3:13], 10), tokens[13:]]
    grown = np.concatenate([session.extend(part) for part in parts])
    assert traced.difference(grown, expected) < 5e-6
    changed = traced.difference(short, expected) > 100 * traced.TOLERANCE
    assert changed == any(layer.recurrence for layer in traced.model(folder).spec.layers)


@pytest.mark.parametrize("field", ["layer_types", "layers_block_type"])
def test_older_files_name_the_kinds_otherwise(field, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, CONFIG | DENSE)
    new = traced.model(folder).spec
    changes = {"layer_types": None, field: ["mamba", "attention", "mamba"]}
    hugging_face.set_config(folder, **changes)
    assert traced.model(folder).spec == new
    # Steps without bounds, in each of the ways in which transformers has written infinity.
    for limit in (None, [0.0, "Infinity"]):
        hugging_face.set_config(folder, time_step_limit=limit)
        assert traced.model(folder).spec == new


@pytest.mark.parametrize("given", [{}, {"layer_types": ["attention"] * 4}])
def test_what_a_file_leaves_out_is_what_transformers_assumes(given):
    from transformers import GraniteMoeHybridConfig

    needed = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 4}
    needed |= {"num_attention_heads": 32, "vocab_size": 1000}
    theirs = GraniteMoeHybridConfig(**needed, **given)
    spec = read_spec({"model_type": "granitemoehybrid", **needed, **given})
    assert spec.max_context == theirs.max_position_embeddings
    assert (spec.tied, spec.norm_eps) == (theirs.tie_word_embeddings, theirs.rms_norm_eps)
    assert spec.ropes == () and theirs.position_embedding_type is None
    assert (spec.scale, spec.logit_multiplier, spec.residual_multiplier) == (1, 1, 1)
    for layer in spec.layers:
        assert (layer.experts, layer.chosen_experts) == (8, 2)
        assert layer.shared_width == theirs.shared_intermediate_size
        if given:
            assert layer.num_kv_heads == theirs.num_key_value_heads
            continue
        made = layer.recurrence
        assert (made.heads, made.value_width) == (theirs.mamba_n_heads, theirs.mamba_d_head)
        assert (made.key_heads, made.key_width) == (theirs.mamba_n_groups, theirs.mamba_d_state)
        assert spec.conv_width == theirs.mamba_d_conv
    biases = {name.rpartition("mamba.")[2] for name in spec.weights if name.endswith(".bias")}
    assert biases == (set() if given else {"dt_proj.bias", "conv.bias"})


def test_presets_are_the_released_sizes():
    spec = read_spec(PRESETS["granite-4.0-h-350m"].config)
    attention = [index for index, each in enumerate(spec.layers) if each.mixer == "attention"]
    assert attention == [10, 13, 17, 27]
    assert spec.ropes == () and not spec.can_rewind and spec.logit_multiplier == 1 / 3
    made = spec.layers[0].recurrence
    assert (made.heads, made.key_heads, made.key_width, made.value_width) == (48, 1, 128, 32)
    tiny = read_spec(PRESETS["granite-4.0-h-tiny"].config).layers[0]
    assert (tiny.experts, tiny.chosen_experts, tiny.ffn_width, tiny.shared_width) == (
        *(64, 6),
        *(512, 1024),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mamba_n_heads": 7}, "mamba_expand times hidden_size is 128, which is not a multiple"),
        ({"mamba_d_head": 12}, "mamba_n_heads 8 times mamba_d_head 12 is not mamba_expand times"),
        ({"mamba_d_head": "wide"}, "mamba_d_head is 'wide'"),
        ({"mamba_n_groups": 3}, "mamba_n_heads 8 is not a multiple of mamba_n_groups 3"),
        ({"mamba_d_conv": 1}, "mamba_d_conv is 1, not a whole number of at least 2"),
        ({"mamba_d_state": 0}, "mamba_d_state is 0"),
        ({"mamba_conv_bias": 1}, "mamba_conv_bias is 1, not true or false"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'; EdgeForge implements 'silu'"),
        (
            {"time_step_limit": [0.001, 0.1]},
            "the first number of time_step_limit is 0.001; EdgeForge",
        ),
        ({"time_step_limit": [0, 0.1]}, "the second number of time_step_limit is 0.1"),
        ({"time_step_limit": 3}, "time_step_limit is 3, not two numbers"),
        ({"layer_types": ["mamba"]}, "layer_types must list 3 kinds"),
        ({"layer_types": ["mamba", "sliding_attention", "mamba"]}, "layer_types[1] is 'sliding"),
        ({"layers_block_type": ["mamba"] * 3}, "layer_types and layers_block_type contradict"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type to 'alibi'"),
        ({"normalization_function": "layernorm"}, "normalization_function to 'layernorm'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_local_experts"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size is 0"),
        ({"mlp_bias": True}, "'mlp_bias' to True"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_in_one_sentence(changes, words):
    with pytest.raises(CheckpointError) as caught:
        read_spec(CONFIG | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


AT = "model.layers.0.mamba."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{AT}A_log": None}, f"lacks {AT}A_log, which its config"),
        ({f"{AT}in_proj.weight": (100, 64)}, f"{AT}in_proj.weight has shape [100, 64]"),
        ({f"{AT}dt_bias": (4,)}, f"{AT}dt_bias has shape [4]; config.json calls for [8]"),
        ({f"{AT}conv1d.weight": (176, 4)}, f"{AT}conv1d.weight has shape [176, 4]"),
        ({f"{AT}in_proj.bias": (312,)}, f"holds {AT}in_proj.bias, which a granitemoehybrid"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, CONFIG | DENSE)
    held = load_file(folder / "model.safetensors")
    for name, shape in change.items():
        held.pop(name, None)
        if shape is not None:
            held[name] = torch.ones(shape)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        traced.model(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_infinity_may_be_written_as_python_writes_it(tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, CONFIG | DENSE)
    config = json.loads((folder / "config.json").read_text())
    config["time_step_limit"] = [0.0, math.inf]
    (folder / "config.json").write_text(json.dumps(config))
    assert "Infinity]" in (folder / "config.json").read_text()
    assert traced.model(folder).spec.layers[0].mixer == "mamba"
