"""RWKV 5 and 6's forward pass in NumPy float64, from their paper (Peng et al., arXiv 2404.05892).

Token shift, time mixing with the sum over all earlier tokens written out, channel mixing. Tensors
have the names and the numbers that the releases' folders have: those of RWKV 5 hold how much of a
token itself a mix has, those of RWKV 6 how much of the token before it. Shares nothing with the
package.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

EPSILON, DIVISOR = 1e-5, 8  # the releases' layer_norm_epsilon and head_size_divisor


def feed_forward_width(config):
    """The stated width, or 3.5 times the residual stream's, of which a multiple of 32 is kept."""
    return config.get("intermediate_size") or int(config["hidden_size"] * 3.5) // 32 * 32


def random_tensors(config, seed=0):
    """Tensors of the releases' names and shapes with random numbers of usual sizes."""
    draw = np.random.default_rng(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    size, width = config["head_size"], feed_forward_width(config)
    found = {}

    def matrix(name, rows, columns, *stacked):
        found[name] = draw.normal(0, columns**-0.5, (*stacked, rows, columns))

    def norm(name):
        found[f"{name}.weight"] = draw.normal(1, 0.2, hidden)
        found[f"{name}.bias"] = draw.normal(0, 0.2, hidden)

    def mix(name):
        found[name] = draw.uniform(0, 1, (1, 1, hidden))

    matrix("rwkv.embeddings.weight", vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"rwkv.blocks.{layer}."
        for name in ("pre_ln", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
            norm(at + name)
        attention, channels = f"{at}attention.", f"{at}feed_forward."
        heads = (hidden // size, size)
        if config["model_type"] == "rwkv5":
            for name in ("key", "value", "receptance", "gate"):
                mix(f"{attention}time_mix_{name}")
            for name in ("key", "receptance"):
                mix(f"{channels}time_mix_{name}")
            found[f"{attention}time_decay"] = draw.normal(-1, 1, heads)
        else:
            rank, decay_rank = (64, 128) if hidden == 4096 else (32, 64)
            for letter in "xwkvrg":
                mix(f"{attention}time_maa_{letter}")
            for letter in "kr":
                mix(f"{channels}time_maa_{letter}")
            matrix(f"{attention}time_maa_w1", hidden, 5 * rank)
            matrix(f"{attention}time_maa_w2", rank, hidden, 5)
            found[f"{attention}time_decay"] = draw.normal(-1, 1, (1, 1, hidden))
            matrix(f"{attention}time_decay_w1", hidden, decay_rank)
            matrix(f"{attention}time_decay_w2", decay_rank, hidden)
        found[f"{attention}time_faaaa"] = draw.normal(0, 1, heads)
        for name in ("receptance", "key", "value", "gate", "output"):
            matrix(f"{attention}{name}.weight", hidden, hidden)
        norm(f"{attention}ln_x")
        matrix(f"{channels}key.weight", width, hidden)
        matrix(f"{channels}receptance.weight", hidden, hidden)
        matrix(f"{channels}value.weight", hidden, width)
    norm("rwkv.ln_out")
    if not config.get("tie_word_embeddings"):
        matrix("head.weight", vocab, hidden)
    return {name: value.astype(np.float32) for name, value in found.items()}


def save(folder, config, seed=0):
    """Writes a checkpoint's folder and returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(config, tensors, tokens):
    """Logits of every position of a text: ``float64[t, vocab]``."""
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = w["rwkv.embeddings.weight"][np.asarray(tokens)]
    x = layer_norm(x, w, "rwkv.blocks.0.pre_ln")
    mixed = eagle if config["model_type"] == "rwkv5" else finch
    for layer in range(config["num_hidden_layers"]):
        at = f"rwkv.blocks.{layer}."
        x = x + mixed(layer_norm(x, w, f"{at}ln1"), w, f"{at}attention.")
        x = x + channel_mixing(layer_norm(x, w, f"{at}ln2"), w, f"{at}feed_forward.")
    x = layer_norm(x, w, "rwkv.ln_out")
    tied = config.get("tie_word_embeddings")
    return x @ w["rwkv.embeddings.weight" if tied else "head.weight"].T


def layer_norm(x, w, name):
    return normalised(x, EPSILON) * w[f"{name}.weight"] + w[f"{name}.bias"]


def normalised(x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)


def before(x):
    """Each token's predecessor; the first has zeros."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def lerp(a, b, mu):
    """``a`` where mu is 0, ``b`` where it is 1."""
    return a + (b - a) * mu


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def eagle(x, w, at):
    """RWKV 5: mixes and decays are the same for all tokens."""
    r, k, v, g = (
        lerp(before(x), x, w[f"{at}time_mix_{name}"][0, 0]) @ w[f"{at}{name}.weight"].T
        for name in ("receptance", "key", "value", "gate")
    )
    decay = np.exp(-np.exp(w[f"{at}time_decay"]))
    return heads_of(r, k, v, g, np.broadcast_to(decay, (len(x), *decay.shape)), w, at)


def finch(x, w, at):
    """RWKV 6: thin matrices (the paper's ``lora``) make mixes and decays of each token."""
    last = before(x)
    shared = np.tanh(lerp(x, last, w[f"{at}time_maa_x"][0, 0]) @ w[f"{at}time_maa_w1"])
    thin = np.split(shared, 5, -1)
    mixed = {
        letter: lerp(x, last, w[f"{at}time_maa_{letter}"][0, 0] + part @ up)
        for letter, part, up in zip("wkvrg", thin, w[f"{at}time_maa_w2"], strict=True)
    }
    r, k, v, g = (
        mixed[letter] @ w[f"{at}{name}.weight"].T
        for letter, name in zip("rkvg", ("receptance", "key", "value", "gate"), strict=True)
    )
    d = np.tanh(mixed["w"] @ w[f"{at}time_decay_w1"]) @ w[f"{at}time_decay_w2"]
    d = d + w[f"{at}time_decay"][0, 0]
    shape = w[f"{at}time_faaaa"].shape
    return heads_of(r, k, v, g, np.exp(-np.exp(d)).reshape(len(x), *shape), w, at)


def heads_of(r, k, v, g, decay, w, at):
    """The heads' results, normalised, gated and transformed; ``decay`` is ``[t, heads, size]``."""
    bonus = w[f"{at}time_faaaa"]
    count, shape = len(r), bonus.shape
    r, k, v = (each.reshape(count, *shape) for each in (r, k, v))
    found = np.zeros((count, *shape))
    for t, h in np.ndindex(count, shape[0]):
        wkv = np.outer(bonus[h] * k[t, h], v[t, h])
        for i in range(t):
            kept = np.prod(decay[i + 1 : t, h], 0)
            wkv += np.outer(kept * k[i, h], v[i, h])
        found[t, h] = r[t, h] @ wkv
    normed = normalised(found / DIVISOR, EPSILON).reshape(count, -1)
    normed = normed * w[f"{at}ln_x.weight"] + w[f"{at}ln_x.bias"]
    return (normed * g * sigmoid(g)) @ w[f"{at}output.weight"].T


def channel_mixing(x, w, at):
    """``sigmoid(r) * value(relu(key) ** 2)``, of tokens that are mixed with those before."""
    last, mixed = before(x), {}
    for name in ("key", "receptance"):
        if f"{at}time_mix_{name}" in w:
            mixed[name] = lerp(last, x, w[f"{at}time_mix_{name}"][0, 0])
        else:
            mixed[name] = lerp(x, last, w[f"{at}time_maa_{name[0]}"][0, 0])
    key = np.maximum(mixed["key"] @ w[f"{at}key.weight"].T, 0) ** 2
    gate = sigmoid(mixed["receptance"] @ w[f"{at}receptance.weight"].T)
    return gate * (key @ w[f"{at}value.weight"].T)
