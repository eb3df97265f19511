"""OpenELM's forward pass in NumPy float64, from the paper (Mehta et al. 2024, arXiv 2404.14619).

Layer-wise scaling (section 2.1), RMSNorm before every block, queries and keys normalised by head
before the rotary embedding (Su et al. 2021), grouped queries (Ainslie et al. 2023), SwiGLU
(Shazeer 2020), a head tied to the embedding. Shares nothing with the package.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

EPSILON = 1e-6


def nearest_multiple(value, divisor):
    """Layer-wise scaling's rounding: to a multiple of ``divisor`` that loses at most a tenth."""
    multiple = max(divisor, divisor * int((value + divisor / 2) / divisor))
    return multiple if multiple >= 0.9 * value else multiple + divisor


def layer_dimensions(config):
    """``(query heads, key/value heads, feed-forward width)`` of each layer."""
    count = config["num_transformer_layers"]

    def by_layer(multipliers):
        if isinstance(multipliers, int | float):
            return [multipliers] * count
        if len(multipliers) == count:
            return multipliers
        return [round(m, 2) for m in np.linspace(*multipliers, num=count)]

    head_dim, groups = config["head_dim"], config.get("num_gqa_groups", 1)
    queries = config.get("num_query_heads") or [
        nearest_multiple(config["model_dim"] * m, head_dim * groups) // head_dim
        for m in by_layer(config.get("qkv_multipliers", 1.0))
    ]
    keys = config.get("num_kv_heads") or [heads // groups for heads in queries]
    widths = [
        nearest_multiple(config["model_dim"] * m, config.get("ffn_dim_divisor", 256))
        for m in by_layer(config.get("ffn_multipliers", 4.0))
    ]
    return list(zip(queries, keys, widths, strict=True))


def random_tensors(config, seed=0):
    """A checkpoint's tensors, float64, with names as the release has them."""
    random = np.random.default_rng(seed)
    hidden, head_dim = config["model_dim"], config["head_dim"]

    def matrix(rows, columns, gain=1.0):
        return random.standard_normal((rows, columns)) * gain / np.sqrt(columns)

    def scale(width):
        return 1 + 0.3 * random.standard_normal(width)

    vocab = config["vocab_size"]
    tensors = {"transformer.token_embeddings.weight": matrix(vocab, hidden, 4.0)}
    for index, (queries, keys, width) in enumerate(layer_dimensions(config)):
        at = f"transformer.layers.{index}."
        tensors[at + "attn_norm.weight"] = scale(hidden)
        rows = (queries + 2 * keys) * head_dim
        tensors[at + "attn.qkv_proj.weight"] = matrix(rows, hidden, 2.0)
        if config.get("normalize_qk_projections"):
            tensors[at + "attn.q_norm.weight"] = 2 * scale(head_dim)
            tensors[at + "attn.k_norm.weight"] = scale(head_dim)
        tensors[at + "attn.out_proj.weight"] = matrix(hidden, queries * head_dim, 2.0)
        tensors[at + "ffn_norm.weight"] = scale(hidden)
        tensors[at + "ffn.proj_1.weight"] = matrix(2 * width, hidden, 2.0)
        tensors[at + "ffn.proj_2.weight"] = matrix(hidden, width, 2.0)
    tensors["transformer.norm.weight"] = scale(hidden)
    if not config.get("share_input_output_layers"):
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    return tensors


def save(folder: Path, config, tensors, dtype="float32", shards=1):
    """Writes a checkpoint folder; returns the tensors as they were rounded to ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rounded = {}
    for file, part in zip(files, parts, strict=True):
        if dtype == "bfloat16":
            import torch

            stored = {name: torch.from_numpy(tensors[name]).bfloat16() for name in part}
            save_torch(stored, folder / file)
            rounded |= {name: value.double().numpy() for name, value in stored.items()}
        else:
            stored = {name: tensors[name].astype(dtype) for name in part}
            save_numpy(stored, folder / file)
            rounded |= {name: value.astype(np.float64) for name, value in stored.items()}
    return rounded


def normalise(x, scale):
    """RMSNorm over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


def rotate(x, base):
    """The rotary embedding of ``[t, heads, width]``: column i turns with column i + width / 2."""
    length, _, width = x.shape
    speeds = base ** (-2 * np.arange(width // 2) / width)
    turns = np.exp(1j * np.arange(length)[:, None] * speeds)[:, None, :]
    turned = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turns
    return np.concatenate((turned.real, turned.imag), -1)


def attend(q, k, v):
    """Causal attention of ``[t, heads, width]`` by ``[t, fewer heads, width]``."""
    length, heads, width = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    hidden = np.triu(np.full((length, length), -np.inf), 1)
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(width) + hidden
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
    return out.reshape(length, heads * width)


def logits(config, tensors, tokens):
    """``float64[t, vocab]`` for ``int[t]`` tokens."""
    head_dim = config["head_dim"]
    embedding = tensors["transformer.token_embeddings.weight"]
    x = embedding[np.asarray(tokens)]
    for index, (queries, keys, width) in enumerate(layer_dimensions(config)):
        at = f"transformer.layers.{index}."
        normed = normalise(x, tensors[at + "attn_norm.weight"])
        packed = (normed @ tensors[at + "attn.qkv_proj.weight"].T).reshape(len(x), -1, head_dim)
        q, k, v = np.split(packed, [queries, queries + keys], axis=1)
        if config.get("normalize_qk_projections"):
            q = normalise(q, tensors[at + "attn.q_norm.weight"])
            k = normalise(k, tensors[at + "attn.k_norm.weight"])
        base = float(config.get("rope_freq_constant", 10000))
        mixed = attend(rotate(q, base), rotate(k, base), v)
        x = x + mixed @ tensors[at + "attn.out_proj.weight"].T
        normed = normalise(x, tensors[at + "ffn_norm.weight"])
        both = normed @ tensors[at + "ffn.proj_1.weight"].T
        gate, value = both[:, :width], both[:, width:]
        x = x + gate / (1 + np.exp(-gate)) * value @ tensors[at + "ffn.proj_2.weight"].T
    x = normalise(x, tensors["transformer.norm.weight"])
    tied = config.get("share_input_output_layers")
    return x @ (embedding if tied else tensors["lm_head.weight"]).T
