"""Writes GGUF files as llama.cpp's converter does, with the package ``gguf`` of its authors.

Names, types and quantizers are the package's; the order of rows and the norms that get 1 added are
as ``convert_hf_to_gguf.py`` has them. Q4_K, Q5_K and Q6_K, which the package cannot quantize, are
packed here from `k_quants` of ggml's description.
"""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, quants
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from gguf.tensor_mapping import get_tensor_name_map
from safetensors import safe_open

# transformers' model_type: llama.cpp's architecture, rows interleaved, 1 added to norms.
KINDS = {
    "llama": ("llama", True, False),
    "mistral": ("llama", True, False),
    "qwen2": ("qwen2", False, False),
    "qwen3": ("qwen3", False, False),
    "gemma": ("gemma", False, True),
    "gemma2": ("gemma2", False, True),
    "gemma3_text": ("gemma3", False, True),
    "phi3": ("phi3", False, False),
    "smollm3": ("smollm3", True, False),
    "granite": ("granite", True, False),
    "olmo2": ("olmo2", False, False),
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows that are rotated together side by side, as the converter's ``permute``."""
    shape = heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def halves(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, 1, values)


def k_quants(values: np.ndarray, kind: str) -> np.ndarray:
    """Blocks of 256 values of Q4_K, Q5_K or Q6_K: ``float32[n, 256] -> uint8[n, bytes]``."""
    return (_q6_k if kind == "Q6_K" else _q45_k)(values.astype(np.float32), kind)


def _q6_k(values: np.ndarray, kind: str) -> np.ndarray:
    inner = values.reshape(len(values), 16, 16)
    steps = np.abs(inner).max(-1) / 31
    whole = (steps.max(-1, keepdims=True) / 127).astype(np.float16)
    scales = np.round(steps / halves(whole.astype(np.float32))).astype(np.int8)
    each = halves(whole.astype(np.float32) * scales)[..., None]
    codes = (np.clip(np.round(inner / each), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    ql = np.concatenate([low[:, :, :2] | (low[:, :, 2:] << 4)], axis=2).reshape(len(values), 128)
    qh = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    parts = (ql, qh.reshape(len(values), 64), scales.view(np.uint8), whole.view(np.uint8))
    return np.concatenate(parts, axis=1)


def _q45_k(values: np.ndarray, kind: str) -> np.ndarray:
    top = 15 if kind == "Q4_K" else 31
    inner = values.reshape(len(values), 8, 32)
    least = np.minimum(inner.min(-1), 0)
    steps = (inner.max(-1) - least) / top
    d = (steps.max(-1, keepdims=True) / 63).astype(np.float16)
    m = (-least.min(-1, keepdims=True) / 63).astype(np.float16)
    scales = np.round(steps / halves(d.astype(np.float32))).astype(np.uint8)
    mins = np.round(-least / halves(m.astype(np.float32))).astype(np.uint8)
    step = halves(d.astype(np.float32) * scales)[..., None]
    begin = (m.astype(np.float32) * mins)[..., None]
    codes = np.clip(np.round((inner + begin) / step), 0, top).astype(np.uint8)
    packed = np.zeros((len(values), 12), np.uint8)
    for at in range(4):
        packed[:, at] = scales[:, at] | ((scales[:, at + 4] >> 4) << 6)
        packed[:, at + 4] = mins[:, at] | ((mins[:, at + 4] >> 4) << 6)
        packed[:, at + 8] = (scales[:, at + 4] & 15) | ((mins[:, at + 4] & 15) << 4)
    pairs = (codes & 15).reshape(len(values), 4, 2, 32)
    low = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(values), 128)
    parts = [d.view(np.uint8), m.view(np.uint8), packed]
    if kind == "Q5_K":
        bits = (codes >> 4).astype(np.uint8)
        parts.append(sum(bits[:, at] << at for at in range(8)).astype(np.uint8))
    return np.concatenate([*parts, low], axis=1)


def quantized(weight: np.ndarray, kind: str) -> np.ndarray:
    """A matrix's bytes or floats in a type, as a file holds them."""
    if kind.endswith("_K"):
        rows = weight.shape[0]
        return k_quants(weight.reshape(-1, 256), kind).reshape(rows, -1)
    return quants.quantize(weight.astype(np.float32), GGMLQuantizationType[kind])


def values_of(stored: np.ndarray, kind: str) -> np.ndarray:
    return quants.dequantize(stored, GGMLQuantizationType[kind])


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                found[name] = stream.get_tensor(name).to(torch.float32).numpy()
    return found


def write(folder: Path, file: Path, kind="F32", *, kinds=None, tokenizer=None, fields=None):
    """Writes the checkpoint in a folder as a GGUF file; returns the values by transformers' name.

    Args:
        folder: a checkpoint of `hugging_face.save`.
        file: the file to write.
        kind: the type of matrices.
        kinds: types of single tensors, by the end of transformers' name.
        tokenizer: the tokenizer's fields, by key after ``tokenizer.``.
        fields: further fields; None removes one.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture, interleaved, added = KINDS[config["model_type"]]
    layers = config["num_hidden_layers"]
    number = next(a for a, n in _architectures().items() if n == architecture)
    names = get_tensor_name_map(number, layers)
    writer = GGUFWriter(file, architecture)
    given = {**metadata(config, architecture), **(fields or {})}
    for key, value in given.items():
        _add(writer, key, value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.{key}", value)
    values = {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in read_folder(folder).items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        chosen = next((k for end, k in (kinds or {}).items() if name.endswith(end)), kind)
        chosen = "F32" if weight.ndim == 1 else chosen
        projection = name.split(".")[-2]
        shift = 1.0 if added and name.endswith("norm.weight") else 0.0
        ordered = weight + np.float32(shift)
        if interleaved and projection in heads:
            ordered = permute(ordered, heads[projection])
        stored = quantized(ordered, chosen) if chosen != "F32" else ordered.astype(np.float32)
        back = values_of(stored, chosen) if chosen != "F32" else stored
        if interleaved and projection in heads:
            width = back.shape[0] // heads[projection]
            back = back.reshape(heads[projection], width // 2, 2, *back.shape[1:])
            back = back.swapaxes(1, 2).reshape(weight.shape)
        values[name] = back - np.float32(shift)
        if chosen in ("F32", "F16"):
            writer.add_tensor(target, stored)
        else:
            writer.add_tensor(target, stored, raw_dtype=GGMLQuantizationType[chosen])
    for name, table in rope_tables(config).items():
        writer.add_tensor(name, table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _architectures() -> dict:
    from gguf.constants import MODEL_ARCH_NAMES

    return {each: MODEL_ARCH_NAMES[each] for each in MODEL_ARCH}


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def metadata(config: dict, architecture: str) -> dict[str, object]:
    """The fields about the model, as the converter writes them."""
    rope = config.get("rope_parameters") or {}
    plain = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = int(head_dim * plain.get("partial_rotary_factor", 1.0))
    found: dict[str, object] = {
        "general.name": "Tiny Random",
        "general.license": "apache-2.0",
        "general.author": "nobody",
    }
    own: dict[str, object] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(plain.get("rope_theta", 10000.0)),
        "rope.dimension_count": width,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
    }
    if plain.get("rope_type") == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(plain["factor"])}
    if config.get("sliding_window") and architecture in ("phi3", "gemma2", "gemma3"):
        own["attention.sliding_window"] = config["sliding_window"]
    if architecture == "phi3":
        own["rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
    if architecture == "gemma2":
        own["attn_logit_softcapping"] = config["attn_logit_softcapping"]
        own["final_logit_softcapping"] = config["final_logit_softcapping"]
    if architecture == "granite":
        own |= {
            "attention.scale": float(config["attention_multiplier"]),
            "embedding_scale": float(config["embedding_multiplier"]),
            "residual_scale": float(config["residual_multiplier"]),
            "logit_scale": float(config["logits_scaling"]),
        }
    return found | {f"{architecture}.{key}": value for key, value in own.items()}


def rope_tables(config: dict) -> dict[str, np.ndarray]:
    """The divisors of frequencies that the converter writes as tensors."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    found = []
    for at in range(0, width, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (at / width)
        if wave < high:
            found.append(1.0)
        elif wave > low:
            found.append(rope["factor"])
        else:
            share = rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]
            smooth = share / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(found, np.float32)}


def split(file: Path, base: Path, count: int) -> list[Path]:
    """Cuts a file into parts, as llama.cpp's ``gguf-split`` does: the first has the metadata."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    parts = [
        base.with_name(f"{base.name}-{at:05}-of-{count:05}.gguf") for at in range(1, count + 1)
    ]
    for at, part in enumerate(parts):
        writer = GGUFWriter(part, architecture)
        writer.add_uint16("split.no", at)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for key, field in reader.fields.items() if at == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                _add(writer, key, field.contents())
        for tensor in reader.tensors[at::count]:
            data = np.array(tensor.data)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def logits_of_transformers(file: Path, tokens) -> torch.Tensor:
    """``float32[t, vocab]`` by transformers' own reader of GGUF files."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    read = load_gguf_checkpoint(str(file), True, model, torch.float32)["tensors"]
    missing, unexpected = model.load_state_dict(read, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing)
    with torch.no_grad():
        return model(torch.as_tensor(tokens)[None], use_cache=False).logits[0]
