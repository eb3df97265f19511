"""Phi-1, 1.5 and 2: both parts of a layer read one LayerNorm; every product has a bias."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader, token_ids
from edgeforge.families.activation import read_activation
from edgeforge.families.assembly import assemble, bias, matrix, norm
from edgeforge.families.llama import read_head_counts
from edgeforge.families.rotary import read_rope, scaled_context
from edgeforge.families.spec import LayerSpec, ModelSpec, WeightSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Phi configuration (transformers' ``PhiConfig`` fields)."""
    config.absent("qk_layernorm")
    hidden, heads, kv_heads, head_dim = read_head_counts(config)
    layer = LayerSpec(heads, kv_heads, config.integer("intermediate_size"))
    layers = (layer,) * config.layer_count("num_hidden_layers")
    vocab = config.integer("vocab_size")
    tied = config.flag("tie_word_embeddings", False)
    max_context = config.integer("max_position_embeddings", 2048)
    rope = read_rope(config, head_dim, max_context, share=0.5, partial=True)
    fields = config.raw()

    def layer_weights(index: int, layer: LayerSpec) -> dict[str, WeightSpec]:
        at = f"model.layers.{index}."
        q, kv, ffn = layer.num_heads * head_dim, layer.num_kv_heads * head_dim, layer.ffn_width
        attn = at + "self_attn."
        products = {
            "self_attn.qk_proj": (hidden, [(attn + "q_proj", q), (attn + "k_proj", kv)]),
            "self_attn.v_proj": (hidden, [(attn + "v_proj", kv)]),
            "self_attn.o_proj": (q, [(attn + "dense", hidden)]),
            "mlp.up_proj": (hidden, [(at + "mlp.fc1", ffn)]),
            "mlp.down_proj": (ffn, [(at + "mlp.fc2", hidden)]),
        }
        weights = _norm(at + "input_layernorm", hidden, "input_layernorm")
        for name, (columns, parts) in products.items():
            weights[name] = matrix("linear", columns, *((f"{p}.weight", n) for p, n in parts))
            weights[f"{name}.bias"] = bias(*((f"{p}.bias", n) for p, n in parts))
        return weights

    return ModelSpec(
        model_type="phi",
        hidden_size=hidden,
        head_dim=head_dim,
        vocab_size=vocab,
        layers=layers,
        norm_eps=config.real("layer_norm_eps", 1e-5),
        ropes=(rope,),
        tied=tied,
        max_context=scaled_context(rope, max_context),
        bos=next(iter(token_ids(fields, generation, "bos_token_id", vocab)), None),
        eos=token_ids(fields, generation, "eos_token_id", vocab),
        pad=next(iter(token_ids(fields, generation, "pad_token_id", vocab)), None),
        activation=read_activation(config, "hidden_act", "gelu_new"),
        gated=False,
        norm="layer",
        block="parallel",
        weights=assemble(
            hidden_size=hidden,
            vocab_size=vocab,
            layers=layers,
            layer_weights=layer_weights,
            embedding="model.embed_tokens.weight",
            final_norm={
                "weight": norm("model.final_layernorm.weight", hidden),
                "bias": bias(("model.final_layernorm.bias", hidden)),
            },
            head=None if tied else "lm_head.weight",
            head_bias="lm_head.bias",
        ),
        ignored=("*.rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())),
    )


def _norm(tensor: str, width: int, name: str) -> dict[str, WeightSpec]:
    return {
        name: norm(f"{tensor}.weight", width),
        f"{name}.bias": bias((f"{tensor}.bias", width)),
    }
