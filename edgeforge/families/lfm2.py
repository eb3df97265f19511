"""LFM2: gated short convolutions in most layers, attention with normed heads in the others."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader, token_ids
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import assemble, bias, convolution, matrix, norm
from edgeforge.families.layer_kinds import CONV, FULL, read_kinds
from edgeforge.families.llama import read_head_counts
from edgeforge.families.rotary import read_rope, scaled_context
from edgeforge.families.spec import LayerSpec, ModelSpec, WeightSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an LFM2 configuration (transformers' ``Lfm2Config`` fields)."""
    hidden, heads, kv_heads, head_dim = read_head_counts(config, 8)
    ffn, biased = _read_width(config), config.flag("conv_bias", False)
    attention = LayerSpec(heads, kv_heads, ffn)
    convolved = LayerSpec(0, 0, ffn, rope=None, mixer="short_conv")
    layers = tuple(attention if kind == FULL else convolved for kind in _read_kinds(config))
    vocab, eps = config.integer("vocab_size"), config.real("norm_eps", 1e-5)
    tied = config.flag("tie_embedding", config.flag("tie_word_embeddings", True))
    max_context = config.integer("max_position_embeddings", 128000)
    rope = read_rope(config, head_dim, max_context, theta=1e6)
    width = config.integer("conv_L_cache", 3, minimum=2)
    for field, same in {
        "block_dim": hidden,
        "block_norm_eps": eps,
        "block_use_swiglu": True,
        "conv_dim": hidden,
        "conv_dim_out": hidden,
        "num_heads": heads,
        "theta": rope.theta,
        "use_pos_enc": True,
    }.items():
        config.require(field, same)  # they repeat other fields, and no code reads them
    fields = config.raw()

    def layer_weights(index: int, layer: LayerSpec) -> dict[str, WeightSpec]:
        at = f"model.layers.{index}."
        weights = {"input_layernorm": norm(at + "operator_norm.weight", hidden)}
        if layer.mixer == "attention":
            q, kv, attn = heads * head_dim, kv_heads * head_dim, at + "self_attn."
            weights |= {
                "self_attn.q_norm": norm(attn + "q_layernorm.weight", head_dim),
                "self_attn.k_norm": norm(attn + "k_layernorm.weight", head_dim),
                "self_attn.qk_proj": matrix(
                    "linear", hidden, (attn + "q_proj.weight", q), (attn + "k_proj.weight", kv)
                ),
                "self_attn.v_proj": matrix("linear", hidden, (attn + "v_proj.weight", kv)),
                "self_attn.o_proj": matrix("linear", q, (attn + "out_proj.weight", hidden)),
            }
        else:
            for part, rows in (("in_proj", 3 * hidden), ("out_proj", hidden)):
                name = f"{at}conv.{part}"
                weights[f"conv.{part}"] = matrix("linear", hidden, (f"{name}.weight", rows))
                if biased:
                    weights[f"conv.{part}.bias"] = bias((f"{name}.bias", rows))
            weights["conv.conv"] = convolution(at + "conv.conv.weight", hidden, width)
            if biased:
                weights["conv.conv.bias"] = bias((at + "conv.conv.bias", hidden))
        mlp = at + "feed_forward."
        return weights | {
            "post_attention_layernorm": norm(at + "ffn_norm.weight", hidden),
            "mlp.gate_up_proj": matrix(
                "linear", hidden, (mlp + "w1.weight", ffn), (mlp + "w3.weight", ffn)
            ),
            "mlp.down_proj": matrix("linear", ffn, (mlp + "w2.weight", hidden)),
        }

    return ModelSpec(
        model_type="lfm2",
        hidden_size=hidden,
        head_dim=head_dim,
        vocab_size=vocab,
        layers=layers,
        norm_eps=eps,
        ropes=(rope,),
        tied=tied,
        max_context=scaled_context(rope, max_context),
        bos=next(iter(token_ids(fields, generation, "bos_token_id", vocab)), None),
        eos=token_ids(fields, generation, "eos_token_id", vocab),
        pad=next(iter(token_ids(fields, generation, "pad_token_id", vocab)), None),
        conv_width=width,
        weights=assemble(
            hidden_size=hidden,
            vocab_size=vocab,
            layers=layers,
            layer_weights=layer_weights,
            embedding="model.embed_tokens.weight",
            final_norm={"weight": norm("model.embedding_norm.weight", hidden)},
            head=None if tied else "lm_head.weight",
        ),
        ignored=("*.rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())),
    )


def _read_kinds(config: ConfigReader) -> tuple[str, ...]:
    """Returns the kind of each layer, which files state by kinds or by indices, or by both."""
    count = config.layer_count("num_hidden_layers")
    listed = config.get("full_attn_idxs")
    if listed is None:
        return read_kinds(config, [FULL] * count, (FULL, CONV))
    if not isinstance(listed, list) or set(listed) - set(range(count)):
        raise CheckpointError(
            f"{config.where}: full_attn_idxs must list layers of 0 to {count - 1}"
        )
    by_index = tuple(FULL if index in listed else CONV for index in range(count))
    kinds = read_kinds(config, by_index, (FULL, CONV))
    if kinds != by_index:
        raise CheckpointError(
            f"{config.where}: layer_types and full_attn_idxs contradict each other; keep one"
        )
    return kinds


def _read_width(config: ConfigReader) -> int:
    """Returns the feed-forward part's width, which most files state before it is adjusted."""
    field = "intermediate_size" if config.get("block_ff_dim") is None else "block_ff_dim"
    config.get("intermediate_size")
    width = config.integer(field)
    step = config.integer("block_multiple_of", 256)
    factor = config.real("block_ffn_dim_multiplier", 1.0)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(factor * int(2 * width / 3))
    return step * -(-width // step)
