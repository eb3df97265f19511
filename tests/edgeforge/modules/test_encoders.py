"""Models of transformers with random weights, and folders of sentence-transformers."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edgeforge import api
from edgeforge.errors import CheckpointError
from edgeforge.modules.export import export
from edgeforge.modules.options import ModuleOptions
from edgeforge.modules.sentence_transformers import read_folder
from edgeforge.modules.source import export_source
from edgeforge.stage_progress import no_progress
from exporters.modules.manifest import ModuleManifest
from exporters.modules.registry import MODULE_TARGETS

SIZE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
LAYERS = {**SIZE, "num_hidden_layers": 1}
TEXT = {"vocab_size": 100, "max_position_embeddings": 32}
IMAGE = {"image_size": 32, "patch_size": 8}
WHISPER = {
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "num_mel_bins": 16,
    "max_source_positions": 25,
    "vocab_size": 100,
    "decoder_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def bert():
    return transformers.BertModel(transformers.BertConfig(**LAYERS, **TEXT))


def clip_text():
    ends = {"eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 0}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**LAYERS, **TEXT, **ends))


MODELS = {
    "bert": bert,
    "clip_text": clip_text,
    "clip_vision": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**LAYERS, **IMAGE)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**LAYERS, **IMAGE)),
    "whisper": lambda: WhisperEncoder(transformers.WhisperConfig(**WHISPER)),
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
        )
    ),
}
BATCH = torch.export.Dim("batch", max=8)
LENGTH = torch.export.Dim("length", min=2, max=32)


def inputs(name):
    """Example inputs of a model and their dynamic dimensions."""
    if name in ("bert", "clip_text"):
        ids = torch.randint(1, 98, (2, 9))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return given, {key: {0: BATCH, 1: LENGTH} for key in given}
    if name == "whisper":
        return {"input_features": torch.randn(2, 16, 50)}, {"input_features": {0: BATCH}}
    return {"pixel_values": torch.randn(2, 3, 32, 32)}, {"pixel_values": {0: BATCH}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.artifact
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    given, shapes = inputs(name)
    onnx = [MODULE_TARGETS["onnx"]]
    bounds = {"fp32": 1e-5, "int8": 0.02} if name == "bert" else {"fp32": 1e-5}
    for recipe, bound in bounds.items():
        options = ModuleOptions(recipe=recipe)
        (folder,) = export(model, given, shapes, onnx, tmp_path / recipe, options)
        found = api.verify_module(folder)
        assert found.samples == 2 and found.outputs[0].name == "last_hidden_state"
        assert all(each.lowering < bound for each in found.outputs)
    # transformers itself is the oracle, at another batch than the trace's.
    session = onnxruntime.InferenceSession(str(tmp_path / "fp32" / "model.onnx"))
    one = {key: value[:1] for key, value in given.items()}
    (state,) = session.run(["last_hidden_state"], {k: v.numpy() for k, v in one.items()})
    with torch.no_grad():
        wanted = model(**one).last_hidden_state.numpy()
    np.testing.assert_allclose(state, wanted, atol=1e-5)


def parts(*names):
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    return [
        {"idx": i, "path": places.get(n, ""), "type": f"sentence_transformers.models.{n}"}
        for i, n in enumerate(names)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sentences")
    bert().save_pretrained(root)
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (root / "modules.json").write_text(json.dumps(parts("Transformer", "Pooling", "Normalize")))
    (root / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.mark.artifact
def test_sentence_encoders(folder, tmp_path):
    targets, options = [MODULE_TARGETS["onnx"]], ModuleOptions(recipe="fp32")
    (made,) = export_source(str(folder), targets, tmp_path / "out", options, no_progress)
    assert (made / "tokenizer.json").read_text() == "{}"
    manifest = ModuleManifest.read(made)
    assert manifest.outputs == {"sentence_embedding": "float32[batch, 64]"}
    assert manifest.ranges == {"batch": "1..64", "tokens": "2..24"}
    assert "mean of the tokens" in manifest.notes[0] and "length 1" in manifest.notes[0]
    api.verify_module(made)
    ids, mask = np.array([[3, 4, 5, 0, 0]]), np.array([[1, 1, 1, 0, 0]])
    session = onnxruntime.InferenceSession(str(made / "model.onnx"))
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.from_numpy(ids[:, :3])).last_hidden_state[0].numpy()
    wanted = states.mean(0) / np.linalg.norm(states.mean(0))
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("modules.json", json.dumps(parts("Transformer", "Pooling", "Dense")), "model of Dense"),
        ("modules.json", json.dumps(parts("Transformer")), "exports folders of one Transformer"),
        ("modules.json", "{", "modules.json cannot be read"),
        ("modules.json", json.dumps([{"type": "a.Transformer", "path": ".."}] * 2), "exports"),
        ("1_Pooling/config.json", "{}", "asks for no pooling"),
        ("1_Pooling/config.json", '{"pooling_mode_weightedmean_tokens": true}', "asks for pool"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, file, content, words):
    for name in ("modules.json", "1_Pooling/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        read_folder(tmp_path)
