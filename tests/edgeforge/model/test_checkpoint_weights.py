"""Weights as a program wants them, read from where checkpoints keep them; what does not fit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.errors import CheckpointError
from edgeforge.families.registry import read_spec
from edgeforge.model.checkpoint_weights import CheckpointWeights

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, HEAD, HEADS, KV, FFN, VOCAB = 12, 4, 3, 1, 7, 11
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "tie_word_embeddings": False,
}
Q, K, V = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
QK = "model.layers.1.self_attn.qk_proj.weight"


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shapes["lm_head"] = (VOCAB, HIDDEN)
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            at + "self_attn.k_proj": (KV * HEAD, HIDDEN),
            at + "self_attn.v_proj": (KV * HEAD, HIDDEN),
            at + "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            at + "mlp.gate_proj": (FFN, HIDDEN),
            at + "mlp.up_proj": (FFN, HIDDEN),
            at + "mlp.down_proj": (HIDDEN, FFN),
            at + "input_layernorm": (HIDDEN,),
            at + "post_attention_layernorm": (HIDDEN,),
        }
    return {f"{name}.weight": torch.randn(s, generator=random) for name, s in shapes.items()}


def open_weights(folder, held, **changes) -> CheckpointWeights:
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(held, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    return CheckpointWeights(checkpoint, read_spec(checkpoint.config))


def refusal(folder, held, **changes) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder, held, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_weight_is_the_stack_of_its_tensors(tmp_path):
    held = tensors()
    weights = open_weights(tmp_path, held)
    shapes = weights.shapes()
    assert len(shapes) == 3 + 2 * 7
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name, parts in {
            "self_attn.qk_proj": ["self_attn.q_proj", "self_attn.k_proj"],
            "self_attn.v_proj": ["self_attn.v_proj"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down_proj": ["mlp.down_proj"],
            "input_layernorm": ["input_layernorm"],
        }.items():
            name = f"{at}{name}.weight"
            expected = np.concatenate([held[f"{at}{part}.weight"].numpy() for part in parts])
            assert shapes[name] == expected.shape
            np.testing.assert_array_equal(weights.float_weight(name).numpy(), expected)
    assert weights.roles()["lm_head.weight"] == "head"
    assert weights.roles()["model.embed_tokens.weight"] == "embedding"
    assert weights.roles()["model.norm.weight"] == "norm"
    assert weights.roles()[QK] == "linear"


@pytest.mark.parametrize("dtypes", ["ff", "bb", "hh", "bf", "bh", "fb"])
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_rows_across_pieces_are_numpys(dtypes, data, tmp_path_factory):
    rows = (HEADS + KV) * HEAD
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    kinds = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
    held = tensors()
    for name, kind in zip((Q, K), dtypes, strict=True):
        held[name] = held[name].to(kinds[kind])
    weights = open_weights(tmp_path_factory.mktemp("rows"), held)
    found = weights.read_rows(QK, start, stop)
    expected = np.concatenate([held[name].float().numpy() for name in (Q, K)])[start:stop]
    np.testing.assert_array_equal(found.float().numpy(), expected)
    cuts = np.cumsum([0, HEADS * HEAD, KV * HEAD])
    touched = {
        kinds[kind]
        for kind, low, high in zip(dtypes, cuts, cuts[1:], strict=False)
        if start < high and stop > low
    }
    assert found.dtype == (touched.pop() if len(touched) == 1 else torch.float32)


def test_rows_of_a_vector_and_of_an_embedding_by_token(tmp_path):
    held = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    weights = open_weights(tmp_path, held)
    norm = weights.read_rows("model.norm.weight", 0, 1)
    assert torch.equal(norm, held["model.norm.weight"].reshape(1, -1))
    tokens = torch.tensor([[3, 0, 3, 10]])
    rows = weights.float_rows("model.embed_tokens.weight", tokens)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, held["model.embed_tokens.weight"].float()[tokens])


def test_fused_tensors_are_read_as_they_are(tmp_path):
    held = tensors()
    for layer in range(2):
        at = f"model.layers.{layer}."
        parts = [held.pop(f"{at}self_attn.{n}_proj.weight") for n in "qkv"]
        held[f"{at}self_attn.qkv_proj.weight"] = torch.cat(parts)
        parts = [held.pop(f"{at}mlp.{n}_proj.weight") for n in ("gate", "up")]
        held[f"{at}mlp.gate_up_proj.weight"] = torch.cat(parts)
    weights = open_weights(tmp_path, held, model_type="phi3")
    at = "model.layers.1.self_attn."
    apart = [weights.float_weight(f"{at}{name}_proj.weight") for name in ("qk", "v")]
    assert torch.equal(torch.cat(apart), held[f"{at}qkv_proj.weight"])


def test_missing_tensors_are_named(tmp_path):
    held = tensors()
    del held[K]
    assert f"lacks {K}, which" in refusal(tmp_path, held)
    del held[V], held["model.norm.weight"]
    assert f"lacks {K} and 2 more" in refusal(tmp_path, held)
    assert "2 layers" in refusal(tmp_path, held)


def test_extra_tensors_are_named(tmp_path):
    bias = "model.layers.0.self_attn.q_proj.bias"
    held = tensors() | {bias: torch.zeros(HEADS * HEAD)}
    assert f"holds {bias}, which a llama" in refusal(tmp_path, held)
    held["model.layers.2.input_layernorm.weight"] = torch.zeros(HIDDEN)
    assert "and 1 more" in refusal(tmp_path, held)


@pytest.mark.parametrize("name", [Q, V, "model.norm.weight", "lm_head.weight"])
def test_a_wrong_shape_shows_both(name, tmp_path):
    held = tensors()
    right = list(held[name].shape)
    wrong = [right[0] + 1, *right[1:]]
    held[name] = torch.zeros(wrong)
    message = refusal(tmp_path, held)
    assert f"{name} has shape {wrong}; config.json calls for {right}" in message
    held[name] = torch.zeros([*right, 1])
    assert name in refusal(tmp_path, held)


def test_transposed_and_misplaced_rows_are_no_match(tmp_path):
    # As many numbers in all, but key rows where value rows should be.
    held = tensors()
    held[K], held[V] = held[K][:-1].clone(), torch.cat([held[K][-1:], held[V]])
    assert K in refusal(tmp_path, held)
    held = tensors()
    down = "model.layers.0.mlp.down_proj.weight"
    held[down] = held[down].T.contiguous()
    assert down in refusal(tmp_path, held)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float64", "bool", "float8_e4m3fn"])
def test_a_dtype_that_is_no_weights_is_refused(dtype, tmp_path):
    held = tensors()
    held[Q] = torch.zeros(held[Q].shape).to(getattr(torch, dtype))
    message = refusal(tmp_path, held)
    assert f"{Q} is {dtype}" in message
    assert "bfloat16, float16, float32" in message


def test_stored_frequencies_are_ignored(tmp_path):
    held = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(HEAD // 2)}
    held["model.rotary_emb.inv_freq"] = torch.ones(HEAD // 2)
    open_weights(tmp_path, held)
    held["model.inv_freq"] = torch.ones(HEAD // 2)
    assert "model.inv_freq" in refusal(tmp_path, held)


def test_a_tied_head_that_is_also_stored_must_be_the_embedding(tmp_path):
    held = tensors()
    embedding = held["model.embed_tokens.weight"]
    held["lm_head.weight"] = embedding.clone()
    weights = open_weights(tmp_path, held, tie_word_embeddings=True)
    assert "lm_head.weight" not in weights.shapes()

    held["lm_head.weight"][-1, -1] += 1
    message = refusal(tmp_path, held, tie_word_embeddings=True)
    assert "lm_head.weight that differs from model.embed_tokens.weight" in message
    held["lm_head.weight"] = embedding.half()
    assert "differs" in refusal(tmp_path, held, tie_word_embeddings=True)
    held["lm_head.weight"] = embedding[:-1].clone()
    assert "differs" in refusal(tmp_path, held, tie_word_embeddings=True)
    assert "lm_head.weight has shape" in refusal(tmp_path, held)

    del held["lm_head.weight"]
    open_weights(tmp_path, held, tie_word_embeddings=True)
    assert "lacks lm_head.weight" in refusal(tmp_path, held)


def test_a_large_stored_head_is_compared_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("edgeforge.model.checkpoint_weights.COMPARED_WEIGHTS", 2 * HIDDEN)
    held = tensors()
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    open_weights(tmp_path, held, tie_word_embeddings=True)
    held["lm_head.weight"][VOCAB - 1, 0] = 7.0
    assert "differs" in refusal(tmp_path, held, tie_word_embeddings=True)


def test_the_mapping_digest_follows_names_and_shapes_alone(tmp_path):
    def digest(held, **changes):
        return open_weights(tmp_path, held, **changes).mapping_digest()

    held = tensors()
    first = digest(held)
    assert first == digest({name: tensor + 1 for name, tensor in held.items()})
    assert first == digest(held, rope_theta=5.0)
    one_layer = {n: t for n, t in held.items() if "layers.1" not in n}
    assert first != digest(one_layer, num_hidden_layers=1)


def test_weights_saved_by_transformers_come_back_unchanged(tmp_path, hugging_face):
    config = CONFIG | {"tie_word_embeddings": True}
    folder = hugging_face.save(tmp_path, config, "bfloat16", "1KB")
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    checkpoint = Checkpoint.open(folder)
    weights = CheckpointWeights(checkpoint, read_spec(checkpoint.config))
    assert len(checkpoint.files) > 2
    expected = torch.cat([stored[name] for name in (Q, K)])
    assert torch.equal(weights.read_rows(QK, 0, len(expected)), expected)
