"""Models of the whole vocabulary are rotated with the same logits, or refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgeforge.model.rotated_weights import rotate
from quant.errors import QuantizationError
from tests.oracles.vocabulary import (
    CONTEXT,
    FULL,
    HEAD,
    LAYERS,
    MIXED,
    MIXTURES,
    RECURRENT,
    SPECS,
    small_spec,
)
from tests.oracles.vocabulary_models import logits_of, small_model

FACTORS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.2, "logit_softcap": 30.0}
ROTATED = {
    "biases and factors": small_spec(LAYERS, biased=True, qk_norm=HEAD, **FACTORS),
    "an untied parallel block": small_spec(biased=True, tied=False, block="parallel", gated=False),
    "convolutions": SPECS["convolutions"],
    "experts": replace(MIXTURES["normalized"], residual_multiplier=0.2),
    "mamba": replace(RECURRENT["mamba"], residual_multiplier=0.2),
    "delta net": RECURRENT["delta-net"],
    "experts of attention": MIXTURES["heads"],
    "experts of both parts": replace(MIXTURES["heads-and-mixture"], residual_multiplier=0.2),
    "a shared expert": small_spec((FULL, replace(MIXED, shared_width=24)), tied=False),
}
REFUSED = {
    "sandwich": (
        replace(SPECS["sandwich"], clip_qkv=0.0),
        "attention_output_norm.weight scales what is added to the residual stream",
    ),
    "post": (SPECS["post"], "qk_proj.weight reads the residual stream without a norm"),
    "layer": (SPECS["parallel"], "layer_norm.* reads the residual stream, and subtracts its mean"),
    "rwkv": (RECURRENT["rwkv6"], "reads the residual stream, and subtracts its mean"),
    "experts behind a LayerNorm": (MIXTURES["biased"], "subtracts its mean"),
    "clip": (SPECS["everything"], "do not lie directly between .*, for they are bounded"),
}


@pytest.mark.parametrize("rotation", ["hadamard", "hadamard-untied", "hadamard-values"])
@pytest.mark.parametrize("name", ROTATED)
def test_a_rotated_model_gives_the_same_logits(name, rotation, tmp_path):
    model = small_model(ROTATED[name], tmp_path / "m")
    made = rotate(model, rotation, CONTEXT)
    wanted, found = logits_of(model), logits_of(made.model, made.program)
    assert torch.allclose(wanted, found, atol=1e-5 * float(wanted.max() - wanted.min()))
    if name == "biases and factors":
        names = ["v_proj.bias", *([] if rotation == "hadamard-values" else ["o_proj.bias"])]
        for each in names:
            weight = f"model.layers.0.self_attn.{each}"
            before = model.weights.float_weight(weight)
            assert not torch.allclose(before, made.model.weights.float_weight(weight), atol=1e-3)


@pytest.mark.parametrize("rotation", ["hadamard", "hadamard-values"])
def test_the_biases_of_mixtures_and_each_experts_outputs_are_turned(rotation, tmp_path):
    model = small_model(MIXTURES["heads-and-mixture"], tmp_path / "m")
    made = rotate(model, rotation, CONTEXT)

    def turned(name: str) -> bool:
        before = model.weights.float_weight(name)
        return not torch.allclose(before, made.model.weights.float_weight(name), atol=1e-3)

    stream = rotation == "hadamard"
    for name in ("self_attn.output.bias", "mlp.output.bias", "self_attn.experts.4.q_proj.weight"):
        assert turned(f"model.layers.0.{name}") == stream
    for name in ("v_proj.weight", *(f"experts.{each}.o_proj.weight" for each in range(5))):
        assert turned(f"model.layers.0.self_attn.{name}")
    assert turned("model.layers.0.self_attn.router.weight") == stream


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_refused_by_name(name, tmp_path):
    spec, words = REFUSED[name]
    with pytest.raises(QuantizationError, match=f"cannot be rotated: .*{words}"):
        rotate(small_model(spec, tmp_path / "m"), "hadamard", CONTEXT)
