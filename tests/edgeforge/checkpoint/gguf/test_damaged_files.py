"""GGUF files that are damaged, hostile, or of a kind that EdgeForge does not read."""

import random
import struct

import numpy as np
import pytest

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.gguf.header import read_header
from edgeforge.errors import CheckpointError
from edgeforge.model.model import open_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
BYTES = [chr(b) if 33 <= b < 127 else chr(256 + b) for b in range(26)]
TOKENIZER = {
    "ggml.model": "gpt2",
    "ggml.pre": "gpt-2",
    "ggml.tokens": [*"abcdefgh", "ab", "abc", *(f"<{i}>" for i in range(22))],
    "ggml.token_type": [1] * 10 + [3] * 22,
    "ggml.merges": ["a b", "ab c"],
    "ggml.bos_token_id": 10,
    "ggml.eos_token_id": 11,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hugging_face):
    return hugging_face.save(tmp_path_factory.mktemp("damaged") / "model", LLAMA)


@pytest.fixture
def file(folder, tmp_path, gguf_files):
    """Writes a file, with some fields replaced, and returns its path."""

    def file(kind="Q8_0", *, tokenizer=None, name="model.gguf", **fields):
        given = {key.replace("__", "."): value for key, value in fields.items()}
        told = {**TOKENIZER, **(tokenizer or {})}
        gguf_files.write(folder, tmp_path / name, kind, tokenizer=told, fields=given)
        return tmp_path / name

    return file


def refused(path, *words):
    with pytest.raises(CheckpointError) as error:
        open_model(str(path))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def test_a_sound_file_is_read(file):
    model = open_model(str(file()))
    assert model.spec.bos == 10 and model.spec.eos == (11,)


@pytest.mark.parametrize("length", [0, 3, 4, 8, 20, 24, 60, 400])
def test_a_file_that_is_cut_short_within_its_header(file, length):
    path = file()
    path.write_bytes(path.read_bytes()[:length])
    refused(path, str(path))


def test_a_file_that_is_cut_short_within_its_tensors(file):
    path = file()
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cut short")


def test_what_is_no_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(path, "not a GGUF file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    refused(path, "Git LFS pointer")
    path.unlink()
    path.mkdir()
    refused(path, "no config.json")


def test_versions(file):
    path = file()
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 1)
    path.write_bytes(data)
    refused(path, "version 1 of GGUF", "newer llama.cpp")
    data[4:8] = struct.pack(">I", 3)
    path.write_bytes(data)
    refused(path, "big-endian")


@pytest.mark.parametrize(("at", "number"), [(8, 2**40), (16, 2**40), (8, 2**63), (16, 2**64 - 1)])
def test_counts_that_no_file_has(file, at, number):
    path = file()
    data = bytearray(path.read_bytes())
    data[at : at + 8] = struct.pack("<Q", number)
    path.write_bytes(data)
    refused(path, "claims")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general__architecture": "mamba"}, ["mamba", "llama, qwen2"]),
        ({"llama__expert_count": 8}, ["mixture of 8 experts"]),
        ({"llama__attention__causal": False}, ["encoder"]),
        ({"llama__attention__value_length": 8}, ["keys of width", "values of width 8"]),
        ({"llama__block_count": None}, ["llama.block_count"]),
        ({"llama__block_count": "two"}, ["llama.block_count", "'two'"]),
        ({"llama__feed_forward_length": [32, 64]}, ["feed_forward_length"]),
        ({"llama__block_count": 2**32 - 1}, ["4294967295 layers"]),
        ({"llama__attention__head_count": 0}, ["without attention heads"]),
        ({"llama__rope__scaling__type": "fancy", "llama__rope__scaling__factor": 2.0}, ["fancy"]),
        ({"llama__logit_scale": 2.0}, ["llama.logit_scale", "--ignore-config"]),
        ({"llama__rope__dimension_count": 8}, ["partial_rotary_factor"]),
        ({"llama__block_count": 2}, ["lacks model.layers.1"]),
        ({"llama__embedding_length": 64}, ["64"]),
    ],
)
def test_models_that_are_not_read_are_refused_by_name(file, fields, words):
    refused(file(**fields), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ggml.model": "bert"}, ["'bert'", "--tokenizer"]),
        ({"ggml.pre": "new-kind"}, ["'new-kind'", "--tokenizer"]),
        ({"ggml.pre": None}, ["tokenizer.ggml.pre", "--tokenizer"]),
        ({"ggml.tokens": None}, ["tokenizer.ggml.token", "--tokenizer"]),
        ({"ggml.tokens": [f"t{i}" for i in range(33)]}, ["33 tokens", "32 rows"]),
        ({"ggml.merges": None}, ["tokenizer.ggml.merges"]),
        ({"ggml.merges": ["a z"]}, ["'a z'"]),
        ({"ggml.token_type": [1, 2]}, ["tokenizer.ggml.token_type"]),
        ({"ggml.bos_token_id": 32}, ["bos_token_id is 32"]),
        ({"ggml.model": "llama"}, ["tokenizer.ggml.scores"]),
        (
            {
                "ggml.model": "llama",
                "ggml.tokens": [str(at) * 7000 for at in range(32)],
                "ggml.scores": [0.0] * 32,
            },
            ["14000 characters"],
        ),
    ],
)
def test_tokenizers_that_are_not_read_are_refused_with_how(file, changes, words, folder):
    path = file(tokenizer=changes)
    refused(path, *words)


def test_another_tokenizer_can_be_named(file, tmp_path):
    from edgeforge.synth.synthesise import write_byte_tokenizer

    (tmp_path / "other").mkdir()
    write_byte_tokenizer(tmp_path / "other", 320)
    path = file(tokenizer={"ggml.model": "bert"})
    opened = Checkpoint.open(path, tokenizer=tmp_path / "other")
    assert opened.tokenizer_files["tokenizer.json"].parent == tmp_path / "other"


def test_scales_that_are_no_numbers_are_seen_when_they_are_read(file):
    path = file()
    entry = read_header(path).tensors["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[entry.offset : entry.offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    weights = open_model(str(path)).weights
    with pytest.raises(CheckpointError, match="no finite number"):
        weights.float_weight("model.layers.0.mlp.gate_up_proj.weight")


def test_types_without_the_package_say_how_to_get_it(file, monkeypatch):
    path = file("Q5_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf.constants", None)
    refused(path, "package gguf", "pip install 'edgeforge[gguf]'")


def test_a_missing_part_is_named(file, gguf_files, tmp_path):
    parts = gguf_files.split(file(name="whole.gguf"), tmp_path / "m", 3)
    parts[1].rename(tmp_path / "away.gguf")
    refused(parts[0], str(parts[1]), "is missing")
    (tmp_path / "away.gguf").rename(parts[1])
    parts[1].write_bytes(parts[2].read_bytes())
    refused(parts[0], "does not belong to")


def test_a_part_under_another_name_is_no_whole_model(file, gguf_files, tmp_path):
    parts = gguf_files.split(file(name="whole.gguf"), tmp_path / "m", 2)
    refused(parts[0].rename(tmp_path / "one.gguf"), "one of 2 parts")


@pytest.mark.parametrize("seed", range(4))
def test_no_spoiled_header_ends_in_another_error(file, seed):
    """Bits, numbers and lengths of the header are spoiled: it is read, or refused in a sentence."""
    path = file()
    sound, start = path.read_bytes(), read_header(path).start
    draw = random.Random(seed)
    outcomes = [0, 0]
    for _ in range(120):
        data = bytearray(sound)
        at = draw.randrange(start)
        match draw.randrange(3):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                size = draw.choice((1, 2, 4, 8))
                number = draw.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
                data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
            case _:
                del data[at : at + draw.randrange(1, 9)]
        path.write_bytes(data)
        try:
            model = open_model(str(path))
            for name in model.spec.weights:
                model.weights.float_weight(name)
            outcomes[0] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes[1] += 1
    assert min(outcomes) > 5, outcomes
