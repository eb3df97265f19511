"""Name and shape of every weight of a checkpoint, from its config.json, for each family."""

from collections.abc import Callable, Iterator, Mapping

from edgeforge.families.openelm import make_divisible

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def tensor_shapes(config: Mapping[str, object]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in the order of the model's layers.

    A tied head is absent. ``config`` is a complete config.json of a known family.
    """
    return list(_TENSORS[str(config["model_type"])](config))


def _int(config: Mapping[str, object], key: str) -> int:
    value = config[key]
    assert isinstance(value, int)
    return value


def _ints(config: Mapping[str, object], key: str) -> list[int]:
    value = config[key]
    assert isinstance(value, list)
    return value


def _attention_dims(config: Mapping[str, object]) -> tuple[int, int, int]:
    """Hidden size, rows of q, rows of k (or of v)."""
    hidden, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    head_dim = _int(config, "head_dim") if "head_dim" in config else hidden // heads
    return hidden, heads * head_dim, _int(config, "num_key_value_heads") * head_dim


def _llama_tensors(config: Mapping[str, object]) -> Shapes:
    hidden, q_rows, kv_rows = _attention_dims(config)
    ffn, vocab = _int(config, "intermediate_size"), _int(config, "vocab_size")
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(_int(config, "num_hidden_layers")):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (q_rows, hidden)
        yield f"{at}.self_attn.k_proj.weight", (kv_rows, hidden)
        yield f"{at}.self_attn.v_proj.weight", (kv_rows, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, q_rows)
        yield f"{at}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{at}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, ffn)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _phi3_tensors(config: Mapping[str, object]) -> Shapes:
    hidden, q_rows, kv_rows = _attention_dims(config)
    ffn, vocab = _int(config, "intermediate_size"), _int(config, "vocab_size")
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(_int(config, "num_hidden_layers")):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.o_proj.weight", (hidden, q_rows)
        yield f"{at}.self_attn.qkv_proj.weight", (q_rows + 2 * kv_rows, hidden)
        yield f"{at}.mlp.gate_up_proj.weight", (2 * ffn, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, ffn)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _openelm_tensors(config: Mapping[str, object]) -> Shapes:
    hidden, head_dim = _int(config, "model_dim"), _int(config, "head_dim")
    heads, kv_heads = _ints(config, "num_query_heads"), _ints(config, "num_kv_heads")
    ffn_multipliers = config["ffn_multipliers"]
    assert isinstance(ffn_multipliers, list)
    yield "transformer.token_embeddings.weight", (_int(config, "vocab_size"), hidden)
    for layer in range(_int(config, "num_transformer_layers")):
        at = f"transformer.layers.{layer}"
        q_rows = heads[layer] * head_dim
        qkv_rows = q_rows + 2 * kv_heads[layer] * head_dim
        ffn = make_divisible(ffn_multipliers[layer] * hidden, _int(config, "ffn_dim_divisor"))
        yield f"{at}.attn.qkv_proj.weight", (qkv_rows, hidden)
        yield f"{at}.attn.q_norm.weight", (head_dim,)
        yield f"{at}.attn.k_norm.weight", (head_dim,)
        yield f"{at}.attn.out_proj.weight", (hidden, q_rows)
        yield f"{at}.ffn.proj_1.weight", (2 * ffn, hidden)
        yield f"{at}.ffn.proj_2.weight", (hidden, ffn)
        yield f"{at}.ffn_norm.weight", (hidden,)
        yield f"{at}.attn_norm.weight", (hidden,)
    yield "transformer.norm.weight", (hidden,)


_TENSORS: dict[str, Callable[[Mapping[str, object]], Shapes]] = {
    "llama": _llama_tensors,
    "mistral": _llama_tensors,
    "openelm": _openelm_tensors,
    "phi3": _phi3_tensors,
}
