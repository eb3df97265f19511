"""A GGUF file through the commands: export, inspect, verify, run, plan, and what they say of it."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from edgeforge.model.model import open_model
from edgeforge.planning.choose import PlanRequest, choose_plan
from edgeforge.weight_store import quantize
from exporters.manifest import Manifest

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def byte_tokens():
    """A byte-level vocabulary without merges but one."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "<s>", "</s>"]
    tokens += [f"[PAD{at}]" for at in range(len(tokens), LLAMA["vocab_size"])]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [1] * 257 + [3, 3] + [5] * (len(tokens) - 259),
        "ggml.merges": ["a b"],
        "ggml.bos_token_id": 257,
        "ggml.eos_token_id": 258,
        "ggml.add_bos_token": True,
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory, hugging_face, gguf_files):
    """A tiny model: its matrices are Q4_0, its head is Q8_0, its embedding Q5_0."""
    folder = tmp_path_factory.mktemp("commands")
    hugging_face.save(folder / "hf", LLAMA)
    kinds = {"embed_tokens.weight": "Q5_0", "lm_head.weight": "Q8_0"}
    path = folder / "tiny-Q4_0.gguf"
    gguf_files.write(folder / "hf", path, "Q4_0", kinds=kinds, tokenizer=byte_tokens())
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-gguf"))


def test_a_file_is_exported_verified_and_run(file, tmp_path, edgeforge):
    out = tmp_path / "out"
    done = edgeforge("export", file, "--target", "onnx", "--context", 64, "--out", out)
    assert done.code == 0, done.err
    manifest = Manifest.read(out)
    assert manifest.recipe == "as-is"
    assert (manifest.source.path, manifest.source.model) == (str(file.resolve()), str(file))
    assert list(manifest.source.files) == [file.name]
    formats = {name: record.format for name, record in manifest.weights.items()}
    assert formats["model.layers.0.mlp.down_proj.weight"] == "int4-g32-asym-f16"
    assert formats["lm_head.weight"] == "int8-g32-f16"
    assert formats["model.embed_tokens.weight"] == "fp16"
    notes = " ".join(manifest.notes)
    assert "stored as the checkpoint has them (GGUF" in notes and "1 from Q5_0" in notes
    card = (out / "CARD.md").read_text(encoding="utf-8")
    assert "apache-2.0" in card and "Tiny Random" in card and "Q5_0" in card
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 258

    shown = edgeforge("inspect", out)
    assert shown.code == 0 and "all files are as written" in shown.out
    checked = edgeforge(
        "verify", out, "--tokens", 100, "--no-timed", "--against", "transformers", "--json"
    )
    assert checked.code == 0, checked.err
    (figures,) = json.loads(checked.out)
    assert figures["stored_weights_equal"]
    ran = edgeforge("run", out, "--prompt", "abab", "--max-tokens", 3)
    assert ran.code == 0, ran.err


def test_the_store_holds_the_files_integers(file, tmp_path, monkeypatch, gguf_files):
    """Codes and scales of the store, computed again from the file by the package's own reader."""
    from gguf import GGUFReader

    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    model = open_model(str(file))
    plan = choose_plan(model, PlanRequest()).plan
    store = quantize(model.weights, model.checkpoint.digest(), plan, 1, lambda *_: None)
    assert all(store.relative_error[name] == 0 for name in model.weights.imported)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    with safe_open(store.file, "np") as stored:
        name = "model.layers.0.mlp.down_proj.weight"
        blocks = np.array(tensors["blk.0.ffn_down.weight"].data).reshape(64, 3, 18)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
        codes = np.concatenate([low, high], -1)
        assert (scales < 0).any() and (scales > 0).any()
        codes = np.where((scales < 0)[..., None], 15 - codes, codes).reshape(64, 96)
        found = stored.get_tensor(f"{name}:codes")
        assert (np.stack((found & 15, found >> 4), -1).reshape(64, 96) == codes).all()
        assert (stored.get_tensor(f"{name}:scale") == np.abs(scales)).all()
        points = stored.get_tensor(f"{name}:zero_point")
        points = np.stack((points & 15, points >> 4), -1).reshape(64, -1)[:, :3]
        assert (points == np.where(scales < 0, 7, 8)).all()

        blocks = np.array(tensors["output.weight"].data).reshape(320, 2, 34)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        codes = blocks[..., 2:].view(np.int8).astype(int).reshape(320, 64) + 128
        assert (stored.get_tensor("lm_head.weight:codes") == codes).all()
        assert (stored.get_tensor("lm_head.weight:scale") == scales).all()


def test_a_block_of_zeros_stays_zeros(tmp_path, hugging_face, gguf_files):
    folder = hugging_face.save(tmp_path / "hf", LLAMA)
    tensors = gguf_files.read_folder(folder)
    for name in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        tensors[name][3, 32:64] = 0
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kinds = {"lm_head.weight": "Q8_0"}
    values = gguf_files.write(folder, tmp_path / "m.gguf", "Q4_0", kinds=kinds)
    weights = open_model(str(tmp_path / "m.gguf")).weights
    for name in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        found = weights.float_weight(name).numpy()
        assert (found[3, 32:64] == 0).all() and (found == values[name]).all()
        rows = weights.imported_rows(name, 0, len(found), weights.imported[name])
        assert (rows.scale.float() > 0).all()


def test_what_a_target_does_not_hold_is_read_as_floats(file, tmp_path, edgeforge):
    out = tmp_path / "out"
    done = edgeforge(
        "export", file, "--target", "executorch", "--context", 64, "--recipe", "int8", "--out", out
    )
    assert done.code == 0, done.err
    assert "are read as floats" in done.err and "XNNPACK" in done.err
    manifest = Manifest.read(out)
    assert not any(record.algorithm == "imported" for record in manifest.weights.values())
    assert any("from Q4_0" in note for note in manifest.notes)
    assert any("are read as floats" in warning for warning in manifest.warnings)
    checked = edgeforge("verify", out, "--tokens", 100, "--no-timed")
    assert checked.code == 0, checked.err


def test_a_plan_is_made_of_a_file(file, edgeforge):
    done = edgeforge("plan", file, "--device", "pixel-8", "--json")
    assert done.code == 0, done.err
    (target,) = json.loads(done.out)["targets"]
    assert any(row["recipe"] == "as-is" for row in target["recipes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "{file}", "--revision", "main"), "has no revision"),
        (("export", "{folder}/absent.gguf"), "absent.gguf"),
        (("export", "{folder}"), "name the file itself as the model"),
        (("plan", "{folder}/absent.gguf", "--device", "pixel-8"), "absent.gguf"),
    ],
)
def test_mistakes_end_in_one_sentence(file, tmp_path, edgeforge, arguments, words):
    given = [word.format(file=file, folder=tmp_path) for word in arguments]
    (tmp_path / "model.gguf").symlink_to(file)
    out = ("--out", tmp_path / "out") if given[0] == "export" else ()
    done = edgeforge(*given, *out)
    assert done.code in (2, 3) and done.out == ""
    assert done.err.count("\n") == 1 and words in done.err, done.err


def test_the_output_may_lie_beside_the_file_and_not_in_its_place(file, tmp_path, edgeforge):
    copy = tmp_path / "model.gguf"
    copy.write_bytes(file.read_bytes())
    done = edgeforge("export", copy, "--target", "onnx", "--context", 64, "--out", copy)
    assert done.code == 2 and copy.read_bytes() == file.read_bytes()
    done = edgeforge("export", copy, "--target", "onnx", "--context", 64, "--out", tmp_path / "out")
    assert done.code == 0, done.err
