"""Checkpoints whose files are missing, cut short, lying or hostile."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgeforge.synth.synthesise import synthesise

CHECKPOINT = 3


def write_header(folder: Path, header: object, data: int = 64) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def test_a_missing_shard_is_named(tmp_path, export):
    folder = synthesise("tiny-llama", tmp_path / "sharded", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    export(folder, CHECKPOINT, "model-00002-of-00003.safetensors is missing", "index lists it")


def test_a_truncated_shard_is_named(tmp_path, export):
    folder = synthesise("tiny-llama", tmp_path / "sharded", shards=3)
    shard = folder / "model-00003-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    export(folder, CHECKPOINT, str(shard), "10")


def test_a_shard_without_the_tensor_its_index_promises_is_named(tmp_path, export):
    folder = synthesise("tiny-llama", tmp_path / "sharded", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    export(folder, CHECKPOINT, "model-00001-of-00002.safetensors", "model.norm.weight")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}, "a"),
        (
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
            },
            "overlap",
        ),
        ({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 64]}}, "a"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "a"),
        (b"{not json", "JSON"),
        (b"[]", "JSON object"),
    ],
    ids=["outside", "overlapping", "huge", "negative", "no JSON", "a list"],
)
def test_a_safetensors_header_that_lies_is_refused(checkpoint, export, header, words):
    write_header(checkpoint, header)
    export(checkpoint, CHECKPOINT, "model.safetensors", words)


@pytest.mark.parametrize("length", [0, 7, 1 << 40, (1 << 64) - 1])
def test_a_header_of_a_false_length_is_refused(checkpoint, export, length):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    export(checkpoint, CHECKPOINT, "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(checkpoint, export, content):
    (checkpoint / "config.json").write_bytes(content)
    export(checkpoint, CHECKPOINT, "config.json")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "x" * 10**6, "has the model_type 'xxx"),
        ("model_type", ["a"] * 10**5, "has the model_type ['a'"),
        ("x" * 10**6, 1, "sets 'xxx"),
        ("mystery", [["a"] * 1000] * 100, "sets 'mystery' to [["),
        ("eos_token_id", ["x" * 10**6], "eos_token_id is 'xxx"),
        ("quantization_config", {"quant_method": ["gptq"]}, "by the quant_method ['gptq']"),
        ("quantization_config", {"quant_method": {"a": 1}}, "by the quant_method {'a': 1}"),
    ],
)
def test_what_a_config_says_is_quoted_in_short(checkpoint, export, field, value, words):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, field: value}))
    assert len(export(checkpoint, CHECKPOINT, words)) < 1000


def test_a_field_with_two_values_is_refused(checkpoint, export):
    text = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(text.replace("{", '{"vocab_size": 7, ', 1))
    export(checkpoint, CHECKPOINT, "the key 'vocab_size' occurs twice, with different values")


def test_no_config_is_refused(checkpoint, export):
    (checkpoint / "config.json").unlink()
    export(checkpoint, CHECKPOINT, "config.json is missing")


def test_a_folder_without_weights_says_what_it_has(checkpoint, export):
    (checkpoint / "model.safetensors").rename(checkpoint / "model.gguf")
    export(checkpoint, CHECKPOINT, "has no weights", "model.gguf")


def test_an_empty_folder_and_a_file_are_no_checkpoints(tmp_path, export):
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", CHECKPOINT, "is not a checkpoint: it has no config.json")
    (tmp_path / "file").touch()
    export(tmp_path / "file", CHECKPOINT, "is a file; name the folder")
    export(tmp_path / "nowhere", CHECKPOINT, "neither a folder here nor a hub id")


def test_a_pickle_that_would_run_code_runs_none(checkpoint, tmp_path, export):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(128)}, checkpoint / "pytorch_model.bin")
    export(checkpoint, CHECKPOINT, "lacks")  # such a file is read
    torch.save({"a": Bomb()}, checkpoint / "pytorch_model.bin")
    export(checkpoint, CHECKPOINT, "pytorch_model.bin")
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    export(checkpoint, CHECKPOINT, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_offline_says_what_is_missing(tmp_path, nothing_is_left):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "EDGEFORGE_CACHE": str(tmp_path / "cache"),
    }
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "edgeforge.cli.entry",
            "export",
            "org/model",
            "-o",
            tmp_path / "out",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == CHECKPOINT and shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    assert "org/model at revision main is not in the cache" in shown.stderr
    assert "HF_HUB_OFFLINE is set" in shown.stderr and "hf download org/model" in shown.stderr
    nothing_is_left()
