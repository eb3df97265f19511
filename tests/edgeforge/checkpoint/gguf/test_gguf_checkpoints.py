"""GGUF files as sources: configuration, weights and logits of every type of tensor and family."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PHI3 = LLAMA | {
    "model_type": "phi3",
    "original_max_position_embeddings": 128,
    "sliding_window": None,
    "head_dim": 16,
    "hidden_size": 64,
}
# The original context is fixed: it is the only one that llama.cpp's table of divisors stands for.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {
    "llama": LLAMA,
    "llama, one head, tied": LLAMA
    | {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, llama3 rope": LLAMA | {"rope_parameters": LLAMA3},
    "llama, other divisors": LLAMA
    | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
    "llama, linear rope": LLAMA
    | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4},
    "phi3": PHI3 | {"sliding_window": 9},
    "phi3, partial rotary, tied": PHI3
    | {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 700.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "phi3, longrope": PHI3
    | {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1 + 0.25 * i for i in range(8)],
            "long_factor": [1.5 + 2.5 * i for i in range(8)],
        },
    },
}
TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")
IMPORTED = {"Q8_0": "int8-g32-f16", "Q4_0": "int4-g32-asym-f16"}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_that_the_file_was_made_of(
    case, tmp_path, hugging_face, traced, gguf_files
):
    config = CASES[case]
    folder = hugging_face.save(tmp_path / "model", config)
    gguf_files.write(folder, tmp_path / "model.gguf")
    tokens = traced.tokens(40, config["vocab_size"])
    context = 30 if "longrope" in case else 40  # transformers chooses a set by the text's length
    expected = hugging_face.logits(folder, tokens[:context])

    opened = traced.model(tmp_path / "model.gguf")
    ours = traced.session(opened, context).logits(tokens[:context])
    assert traced.difference(ours, expected) < traced.TOLERANCE
    if case not in ("llama, other divisors", "mistral"):
        wanted = dataclasses.asdict(traced.model(folder).spec)
        assert dataclasses.asdict(opened.spec) == wanted


# What llama.cpp's files cannot say otherwise: scales of attention, and the order of windows.
OTHERS = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3_text": {
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "granite": {},
    "olmo2": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
}


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_that_llama_cpp_has(
    family, tmp_path, hugging_face, traced, gguf_files, tiny_families
):
    config = tiny_families.CONFIGS[family] | OTHERS[family]
    config |= {"bos_token_id": None, "eos_token_id": None}
    folder = hugging_face.save(tmp_path / "model", config)
    stored = "Q8_0" if config["hidden_size"] % 32 == 0 else "F16"
    values = gguf_files.write(folder, tmp_path / "model.gguf", stored)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    tokens = traced.tokens(40, config["vocab_size"])
    expected = hugging_face.logits(folder, tokens)
    opened = traced.model(tmp_path / "model.gguf")
    ours = traced.session(opened, 40).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE
    assert dataclasses.asdict(opened.spec) == dataclasses.asdict(traced.model(folder).spec)


def test_every_architecture_is_tried():
    from edgeforge.checkpoint.gguf.architectures import ARCHITECTURES

    tried = {"llama", "phi3"} | {name.removesuffix("_text") for name in OTHERS}
    assert tried == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [*(("llama", stored) for stored in TYPES + K_TYPES), ("phi3", "Q4_0"), ("phi3", "Q6_K")],
)
def test_logits_of_every_type_are_those_of_its_values(
    kind, stored, tmp_path, hugging_face, traced, gguf_files
):
    config = CASES[kind]
    if stored in K_TYPES:
        config = config | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        config |= {"num_attention_heads": 8, "head_dim": 32}
    folder = hugging_face.save(tmp_path / "model", config)
    values = gguf_files.write(folder, tmp_path / "model.gguf", stored)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    tokens = traced.tokens(24, config["vocab_size"])
    expected = hugging_face.logits(folder, tokens)

    opened = traced.model(tmp_path / "model.gguf")
    ours = traced.session(opened, 24).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE
    formats = {format.name for format in opened.weights.imported.values()}
    assert formats == ({IMPORTED[stored]} if stored in IMPORTED else set())
    for name, spec in opened.spec.weights.items():
        whole = opened.weights.float_weight(name)
        wanted = np.concatenate(
            [values[p.tensor][p.first : p.first + p.shape[0]] for p in spec.pieces]
        )
        assert (whole.numpy() == wanted).all(), name
        if whole.dim() == 2:  # rows alone are those of the whole
            assert torch.equal(opened.weights.read_rows(name, 3, 8).float(), whole[3:8])


@pytest.mark.parametrize("stored", ["Q4_0", "Q8_0"])
def test_transformers_reads_the_same_from_the_same_file(
    stored, tmp_path, hugging_face, traced, gguf_files
):
    folder = hugging_face.save(tmp_path / "model", LLAMA)
    gguf_files.write(folder, tmp_path / "model.gguf", stored)
    tokens = traced.tokens(24, LLAMA["vocab_size"])
    expected = gguf_files.logits_of_transformers(tmp_path / "model.gguf", tokens)
    opened = traced.model(tmp_path / "model.gguf")
    ours = traced.session(opened, 24).logits(tokens)
    assert traced.difference(ours, expected) < traced.TOLERANCE


def test_a_split_model_is_read_from_any_of_its_parts(tmp_path, hugging_face, gguf_files, traced):
    folder = hugging_face.save(tmp_path / "model", LLAMA)
    whole = gguf_files.write(folder, tmp_path / "whole.gguf", "Q8_0")
    parts = gguf_files.split(tmp_path / "whole.gguf", tmp_path / "m", 3)
    for part in parts:
        opened = traced.model(part)
        assert opened.checkpoint.files == tuple(parts)
        for name, spec in opened.spec.weights.items():
            wanted = np.concatenate([whole[piece.tensor] for piece in spec.pieces])
            assert (opened.weights.float_weight(name).numpy() == wanted).all()
    assert len(opened.checkpoint.digest().files) == 3


def test_config_and_licence_come_from_the_metadata(tmp_path, hugging_face, traced, gguf_files):
    from edgeforge.checkpoint.model_card import licence_id, provenance

    folder = hugging_face.save(tmp_path / "model", LLAMA | {"num_hidden_layers": 1})
    gguf_files.write(folder, tmp_path / "tiny.gguf", "Q8_0")
    checkpoint = traced.model(tmp_path / "tiny.gguf").checkpoint
    origin = provenance(checkpoint)
    assert (origin.title, origin.author, origin.licence) == ("Tiny Random", "nobody", "apache-2.0")
    assert licence_id(checkpoint) == "apache-2.0"
    assert checkpoint.place == (tmp_path / "tiny.gguf").resolve()
    written = json.loads(checkpoint.sidecars["config.json"].read_text())
    assert written == checkpoint.config
    assert [file.name for file in checkpoint.digest().files] == ["tiny.gguf"]
