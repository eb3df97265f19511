"""The script that makes a real model's folder: its parts that need no download."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "real_model" / "build.py"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_model_build", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_return_to_the_order_before_llama_cpp_interleaved_them(build):
    heads, width, columns = 3, 8, 5
    rows = np.arange(heads * width * columns, dtype=np.float32).reshape(-1, columns)
    # As llama.cpp's converter writes the rows of queries and keys.
    halves = rows.reshape(heads, 2, width // 2, columns)
    interleaved = halves.swapaxes(1, 2).reshape(rows.shape)
    assert not np.array_equal(interleaved, rows)
    assert np.array_equal(build.unpermuted(interleaved, heads), rows)


def test_the_tokenizer_splits_numbers_and_keeps_control_tokens_whole(build, tmp_path):
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|end|>", *letters, "\u0120", "ab", "12"]
    fields = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] + [1] * (len(words) - 1),
        "tokenizer.ggml.merges": ["a b", "1 2"],
        "tokenizer.ggml.add_space_prefix": False,
    }
    file = tmp_path / "tokenizer.json"
    build.write_json(file, build.tokenizer(fields))
    tokenizer = Tokenizer.from_file(str(file))
    assert tokenizer.encode("ab 12<|end|>").tokens == ["ab", "\u0120", "1", "2", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("ab 12!").ids) == "ab 12!"


def test_a_file_with_another_digest_is_refused(build, tmp_path):
    file = tmp_path / "package.whl"
    file.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="is not what this script knows"):
        build.check(file, build.PACKAGE_SHA256)


def test_the_configuration_is_llamas(build):
    fields = {
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.context_length": 8192,
        "llama.block_count": 30,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100000.0,
        "llama.vocab_size": 49152,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
    }
    config = json.loads(json.dumps(build.config(fields)))
    assert config["rms_norm_eps"] == 1e-5 and config["head_dim"] == 64
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
