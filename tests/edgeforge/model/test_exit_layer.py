"""A model that is cut after one of its layers: its logits, its sizes, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from edgeforge.errors import CheckpointError, UsageError
from edgeforge.forecast.sized_model import size_model
from edgeforge.model.exit_layer import cut_after
from edgeforge.model.model import open_model

TOKENS = np.random.default_rng(2).integers(0, 128, 17)
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": {"model_type": "llama", **SHAPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **SHAPE, "head_dim": 12, "sliding_window": 6},
    # Only layers with a window, and with the second rotary embedding, are left of it.
    "gemma3_text": {
        "model_type": "gemma3_text",
        **SHAPE,
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    },
    "phi3": {"model_type": "phi3", **SHAPE, "pad_token_id": 0, "eos_token_id": 2},
    # One tensor for each matrix of an expert, and one for all of a layer.
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **SHAPE,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "granitemoe": {
        "model_type": "granitemoe",
        **SHAPE,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "jetmoe": {
        "model_type": "jetmoe",
        **SHAPE,
        "kv_channels": 12,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        **SHAPE,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 6,
        "mamba_d_state": 8,
        "num_local_experts": 0,
        "shared_intermediate_size": 80,
    },
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layer", [1, 2])
def test_the_logits_are_those_of_a_model_of_so_many_layers(
    family, layer, tmp_path, hugging_face, traced
):
    folder = hugging_face.save(tmp_path / family, CONFIGS[family])
    wanted = hugging_face.logits(folder, TOKENS, num_hidden_layers=layer).numpy()
    whole = hugging_face.logits(folder, TOKENS).numpy()
    model = open_model(str(folder), exit_layer=layer)
    found = traced.session(model, 32).logits(TOKENS)
    assert traced.difference(found, wanted) < traced.TOLERANCE
    assert traced.difference(found, whole) > 0.05


def test_what_is_left_out_is_gone_from_the_spec(tmp_path, hugging_face):
    folder = hugging_face.save(tmp_path / "llama", CONFIGS["llama"])
    whole = open_model(str(folder))
    cut = open_model(str(folder), exit_layer=2)
    assert (cut.exit_layer, cut.checkpoint_layers, len(cut.spec.layers)) == (2, 3, 2)
    assert (whole.exit_layer, whole.checkpoint_layers) == (None, 3)
    gone = set(whole.spec.weights) - set(cut.spec.weights)
    assert gone and all(name.startswith("model.layers.2.") for name in gone)
    assert {name: whole.spec.weights[name] for name in cut.spec.weights} == cut.spec.weights
    layer = sum(np.prod(whole.spec.weights[name].shape) for name in gone)
    assert whole.spec.num_parameters - cut.spec.num_parameters == layer
    assert cut.weights.shapes() == {n: w.shape for n, w in cut.spec.weights.items()}
    # `plan` sizes the same model from the folder and from its configuration alone.
    for source in (folder, folder / "config.json"):
        assert size_model(str(source), exit_layer=2).shapes() == cut.weights.shapes()


def test_layers_that_are_left_out_are_checked_all_the_same(tmp_path, hugging_face):
    folder = hugging_face.save(tmp_path / "llama", CONFIGS["llama"])
    hugging_face.set_config(folder, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=re.escape("the checkpoint lacks model.layers.3.")):
        open_model(str(folder), exit_layer=1)


def test_a_checkpoint_that_is_quantized_already(tmp_path, packed_checkpoints):
    config = packed_checkpoints.family("llama", num_hidden_layers=2)
    folder = tmp_path / "packed"
    packed_checkpoints.write(folder, config, packed_checkpoints.CASES["gptq-symmetric"])
    whole, cut = (open_model(str(folder), exit_layer=layer) for layer in (None, 1))
    assert set(cut.weights.imported) < set(whole.weights.imported)
    assert len(cut.weights.imported) == len(whole.weights.imported) / 2


@pytest.mark.parametrize("layer", [-1, 0, 3, 4, 99])
def test_layers_that_the_model_does_not_have(layer, tmp_path, hugging_face):
    folder = hugging_face.save(tmp_path / "llama", CONFIGS["llama"])
    words = (
        f"--exit-layer {layer} is not possible: this model has 3 layers and is cut after one of "
        f"its layers 1 to 2"
    )
    with pytest.raises(UsageError, match=re.escape(words)):
        open_model(str(folder), exit_layer=layer)
    with pytest.raises(UsageError, match=re.escape(words)):
        size_model(str(folder / "config.json"), exit_layer=layer)


def test_a_model_of_one_layer_cannot_be_cut(tmp_path, hugging_face):
    folder = hugging_face.save(tmp_path / "one", {**CONFIGS["llama"], "num_hidden_layers": 1})
    spec = open_model(str(folder)).spec
    with pytest.raises(UsageError, match="this model has only one layer"):
        cut_after(spec, 1)
