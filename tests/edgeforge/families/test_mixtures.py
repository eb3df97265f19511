"""Variants of the families of mixtures against transformers, and what does not fit together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge.errors import CheckpointError
from edgeforge.families.expert_names import token_share
from edgeforge.families.facts import facts_of
from edgeforge.families.registry import read_spec
from edgeforge.synth.synthesise import PRESETS
from tests.oracles.tiny_families import MIXTURES, VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "mixtral: one expert a token, a window": (
        "mixtral",
        {"num_experts_per_tok": 1, "sliding_window": 9},
    ),
    "mixtral: every token has every expert": ("mixtral", {"num_experts_per_tok": 8}),
    "mixtral: one expert in all": ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "mixtral: GELU, tied": ("mixtral", {"hidden_act": "gelu_new", "tie_word_embeddings": True}),
    "qwen3_moe: shares as they are, biases, a window in every layer": (
        "qwen3_moe",
        {"norm_topk_prob": False, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 7},
    ),
    "qwen3_moe: every other layer, all of them dense": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "olmoe: grouped queries, biases, shares divided by their sum": (
        "olmoe",
        {"num_key_value_heads": 2, "attention_bias": True, "norm_topk_prob": True}
        | {"clip_qkv": None},
    ),
    "granitemoe: biases, untied": (
        "granitemoe",
        {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "phimoe: a jitter that shuts out most candidates, no biases": (
        "phimoe",
        {"router_jitter_noise": 0.001, "attention_bias": False, "lm_head_bias": False},
    ),
    "phimoe: a jitter that shuts out none": ("phimoe", {"router_jitter_noise": 5.0}),
    "qwen2_moe: experts in all layers, no biases, shares divided by their sum": (
        "qwen2_moe",
        {"decoder_sparse_step": 1, "qkv_bias": False, "norm_topk_prob": True}
        | {"use_sliding_window": False},
    ),
    "jetmoe: one expert a token": ("jetmoe", {"num_experts_per_tok": 1, "num_attention_heads": 2}),
    "jetmoe: every token has every expert": (
        "jetmoe",
        {"num_experts_per_tok": 5, "num_attention_heads": 10},
    ),
    "jetmoe: one expert in all": (
        "jetmoe",
        {"num_local_experts": 1, "num_experts_per_tok": 1, "num_attention_heads": 2},
    ),
    "jetmoe: GELU, untied, narrow heads": (
        "jetmoe",
        {"activation_function": "gelu", "tie_word_embeddings": False, "kv_channels": 10},
    ),
    "jetmoe: one key/value head, a stretched rope": (
        "jetmoe",
        {"num_key_value_heads": 1, "num_attention_heads": 3}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_the_logits_of_transformers(variant, tmp_path, hugging_face, traced):
    family, changes = VARIANTS[variant]
    folder = hugging_face.save(tmp_path, MIXTURES[family] | changes)
    tokens = traced.tokens(40, VOCAB)
    expected = hugging_face.logits(folder, tokens)
    session = traced.session(traced.model(folder), 48)
    parts = [tokens[:3], *np.split(tokens[3:13], 10), tokens[13:]]
    grown = np.concatenate([session.extend(part) for part in parts])
    assert traced.difference(grown, expected) < traced.TOLERANCE


@pytest.mark.parametrize("context", [16, 48])
def test_phi_moe_stretches_positions_by_the_declared_context(
    context, tmp_path, hugging_face, traced
):
    """transformers takes the short factors for all texts; Microsoft's own code does not."""
    short, long = [1 + 0.2 * i for i in range(8)], [1.5 + 2.5 * i for i in range(8)]
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": short,
        "long_factor": long,
        "short_mscale": 1.3,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 16,
    }
    config = MIXTURES["phimoe"] | {"original_max_position_embeddings": 16}
    folder = hugging_face.save(tmp_path, config | {"rope_parameters": scaling})
    tokens = traced.tokens(context, VOCAB)
    chosen = dict(scaling, short_factor=long) if context > 16 else scaling
    expected = hugging_face.logits(folder, tokens, rope_parameters=chosen)
    opened = traced.model(folder)
    assert opened.spec.rope.attention_factor == 1.3
    ours = traced.session(opened, context).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE


def test_the_widths_of_sparse_and_dense_layers():
    layers = read_spec(MIXTURES["qwen3_moe"]).layers
    assert [(each.experts, each.ffn_width) for each in layers] == [(12, 32), (0, 96), (12, 32)]
    layers = read_spec(MIXTURES["qwen2_moe"]).layers
    found = [(each.experts, each.ffn_width, each.shared_width, each.window) for each in layers]
    assert found == [(0, 96, 0, 7), (8, 32, 64, 0), (0, 96, 0, 7), (8, 32, 64, 0)]


def test_half_of_phi_moes_rules_are_constants_of_the_release():
    spec = read_spec(PRESETS["phi-3.5-moe"].config)
    assert (spec.router, spec.router_jitter, spec.norm) == ("sparse_mixer", 0.01, "layer")
    assert spec.rope.attention_factor == 1.243163121016122


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_local_experts"),
        ("mixtral", {"num_local_experts": 1}, "num_local_experts is only 1"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0, not a whole number"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, not a whole number"),
        ("mixtral", {"num_local_experts": "8"}, "num_local_experts is '8'"),
        ("mixtral", {"num_experts": 4}, "num_local_experts is 8 and num_experts is 4; keep one"),
        ("qwen3_moe", {"num_experts": 2}, "num_experts_per_tok is 3, but num_experts is only 2"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1, not a list of layers"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "not a list of layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
            "'max_window_layers' to 2",
        ),
        ("qwen3_moe", {"n_shared_experts": 1}, "'n_shared_experts' to 1"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"]}, "must list 4 kinds"),
        ("phimoe", {"num_experts_per_tok": 1}, "this family's router gives each token 2 experts"),
        ("phimoe", {"router_jitter_noise": -0.1}, "router_jitter_noise is -0.1"),
        (
            "phimoe",
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "short_mscale": 1.1,
                    "long_mscale": 1.2,
                }
            },
            "short_mscale 1.1 and long_mscale 1.2 differ",
        ),
        ("granitemoe", {"mlp_bias": True}, "'mlp_bias' to True"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv is -1.0"),
        (
            "jetmoe",
            {"num_attention_heads": 4},
            "num_attention_heads is 4, but a token of this family has 3 experts of 2 heads: 6",
        ),
        (
            "jetmoe",
            {"num_experts_per_tok": 6, "num_attention_heads": 12},
            "num_experts_per_tok is 6, but num_local_experts is only 5",
        ),
        ("jetmoe", {"moe_top_k": 2}, "moe_top_k is 2 and num_experts_per_tok is 3; keep one"),
        ("jetmoe", {"moe_num_experts": "5"}, "moe_num_experts is '5' and num_local_experts is 5"),
        ("jetmoe", {"head_dim": 8}, "kv_channels is 24 and head_dim is 8; keep one"),
        ("jetmoe", {"kv_channels": 9}, "head_dim 9"),
        ("jetmoe", {"glu": False}, "'glu' to False"),
        ("jetmoe", {"bias": False}, "'bias' to False"),
        ("jetmoe", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_in_one_sentence(family, changes, words):
    with pytest.raises(CheckpointError) as caught:
        read_spec(MIXTURES[family] | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_authors_own_names_of_fields_are_read_too():
    given = dict(MIXTURES["jetmoe"])
    renamed = {
        "moe_num_experts": given.pop("num_local_experts"),
        "moe_top_k": given.pop("num_experts_per_tok"),
        "ffn_hidden_size": given.pop("intermediate_size"),
        "glu": True,
        "bias": True,
    }
    spec = read_spec(MIXTURES["jetmoe"])
    assert read_spec(given | renamed) == spec
    assert read_spec(MIXTURES["jetmoe"] | renamed) == spec
    counts = {(each.attention_experts, each.chosen_attention_experts) for each in spec.layers}
    assert counts == {(5, 3)} and spec.layers[0].num_heads == 6


@pytest.mark.parametrize("dense", [False, True])
def test_targets_are_told_of_attentions_experts(dense):
    spec = read_spec(MIXTURES["jetmoe"])
    assert spec.mixture
    if dense:
        layers = tuple(replace(each, experts=0, chosen_experts=0) for each in spec.layers)
        spec = replace(spec, layers=layers)
    facts = facts_of(spec, 64)
    assert (facts.experts, facts.chosen_experts) == (5, 3)
    assert (facts.num_heads[0], facts.num_kv_heads[0]) == (6, 2)
    share = token_share(spec, "model.layers.0.self_attn.experts.4.o_proj.weight")
    assert share == 3 / 5 and token_share(spec, "model.layers.0.self_attn.k_proj.weight") == 1


AT = "model.layers.1.block_sparse_moe."
JET = "model.layers.1.self_attention."


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        (
            "mixtral",
            {f"{AT}experts.7.w1.weight": None},
            f"lacks {AT}experts.7.w1.weight, which its config",
        ),
        (
            "mixtral",
            {f"{AT}experts.7.w1.weight": None, f"{AT}experts.7.w2.weight": None},
            f"lacks {AT}experts.7.w1.weight and 1 more",
        ),
        (
            "mixtral",
            {f"{AT}experts.8.w1.weight": (96, 64)},
            f"holds {AT}experts.8.w1.weight, which",
        ),
        (
            "mixtral",
            {f"{AT}gate.weight": (4, 64)},
            f"{AT}gate.weight has shape [4, 64]; config.json calls",
        ),
        ("mixtral", {f"{AT}gate.weight": None}, f"lacks {AT}gate.weight"),
        (
            "mixtral",
            {f"{AT}experts.3.w2.weight": (64, 90)},
            f"{AT}experts.3.w2.weight has shape [64, 90]",
        ),
        (
            "mixtral",
            {f"{AT}experts.3.w3.weight": (90, 64)},
            f"{AT}experts.3.w3.weight has shape [90, 64]",
        ),
        (
            "jetmoe",
            {f"{JET}experts.input_linear.weight": (5, 50, 64)},
            f"{JET}experts.input_linear.weight has shape [5, 50, 64]; config.json calls for [5, 48",
        ),
        (
            "jetmoe",
            {f"{JET}experts.output_linear.weight": (4, 64, 48)},
            f"{JET}experts.output_linear.weight has shape [4, 64, 48]",
        ),
        (
            "jetmoe",
            {f"{JET}experts.router.layer.weight": (4, 64)},
            f"{JET}experts.router.layer.weight has shape [4, 64]",
        ),
        ("jetmoe", {f"{JET}experts.bias": None}, f"lacks {JET}experts.bias"),
        ("jetmoe", {f"{JET}kv_proj.weight": (48, 64)}, f"{JET}kv_proj.weight has shape [48, 64]"),
        ("jetmoe", {f"{JET}q_proj.weight": (48, 64)}, f"holds {JET}q_proj.weight, which"),
        ("jetmoe", {"model.layers.0.mlp.bias": (63,)}, "mlp.bias has shape [63]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(family, change, words, tmp_path, hugging_face, traced):
    folder = hugging_face.save(tmp_path, MIXTURES[family])
    held = load_file(folder / "model.safetensors")
    for name, shape in change.items():
        held.pop(name, None)
        if shape is not None:
            held[name] = torch.ones(shape)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        traced.model(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
