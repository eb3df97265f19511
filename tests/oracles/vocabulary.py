"""Small specs that together use every word of the vocabulary, without a checkpoint or a family."""

from __future__ import annotations

from dataclasses import replace

from edgeforge.families.assembly import assemble, bias, convolution, matrix, norm
from edgeforge.families.spec import LayerSpec, ModelSpec, RopeSpec, WeightSpec
from tests.oracles import recurrent_layers
from tests.oracles.recurrent_layers import CONV, DELTA, EAGLE, FINCH, MAMBA

HIDDEN, HEAD, FFN, VOCAB, CONTEXT = 32, 8, 48, 50, 64
FULL = LayerSpec(4, 2, FFN)
LAYERS = (
    replace(FULL, window=8, rope=1),
    replace(FULL, rope=None),
    FULL,
    LayerSpec(0, 0, FFN, mixer="short_conv"),
    LayerSpec(0, 0, FFN, mixer="short_conv"),
)
ROPES = (RopeSpec(1e6, HEAD), RopeSpec(1e4, HEAD // 2))


def small_spec(
    layers: tuple[LayerSpec, ...] = (FULL, FULL),
    *,
    biased: bool = False,
    qk_norm: int = 0,
    scaled: bool = True,
    shifted: bool = False,
    tied: bool = True,
    attention_gate: bool = False,
    **fields: object,
) -> ModelSpec:
    """A spec with all weights that its fields call for.

    Args:
        layers: the layers.
        biased: whether every product, the head and the convolutions have a bias.
        qk_norm: the width of the norms of queries and keys; -1 for all heads, 0 for none.
        scaled: whether norms have a scale.
        shifted: whether norms have a shift; only for LayerNorm.
        tied: whether the head is the embedding.
        attention_gate: whether attention's result has a gate.
        fields: further fields of `ModelSpec`.
    """
    block, gated = fields.get("block", "pre"), fields.get("gated", True)

    def normed(name: str) -> dict[str, WeightSpec]:
        parts = {}
        if scaled:
            parts[name] = norm(name, HIDDEN, added=1.0)
        if shifted:
            parts[f"{name}.bias"] = bias((f"{name}.bias", HIDDEN))
        return parts

    def product(name: str, columns: int, rows: int) -> dict[str, WeightSpec]:
        made = {name: matrix("linear", columns, (name, rows))}
        if biased:
            made[f"{name}.bias"] = bias((f"{name}.bias", rows))
        return made

    def layer_weights(index: int, layer: LayerSpec) -> dict[str, WeightSpec]:
        if layer.attention_experts:
            made = heads_weights(layer)
        elif layer.mixer == "attention":
            q, k = layer.num_heads * HEAD, layer.num_kv_heads * HEAD
            made = {
                **product("self_attn.qk_proj", HIDDEN, q + k),
                **product("self_attn.v_proj", HIDDEN, k),
                **product("self_attn.o_proj", q, HIDDEN),
            }
            if attention_gate:
                made |= product("self_attn.gate_proj", HIDDEN, q)
            for part, width in (("q", q), ("k", k)):
                if qk_norm:
                    wide = width if qk_norm < 0 else qk_norm
                    made[f"self_attn.{part}_norm"] = norm(f"{part}_norm", wide)
        elif layer.recurrence is not None:
            made = recurrent_layers.mixer_weights(layer, HIDDEN)
        else:
            made = {
                **product("conv.in_proj", HIDDEN, 3 * HIDDEN),
                "conv.conv": convolution("conv", HIDDEN, 3),
                **product("conv.out_proj", HIDDEN, HIDDEN),
            }
            if biased:
                made["conv.conv.bias"] = bias(("conv.bias", HIDDEN))
        names = {
            "pre": ("input_layernorm", "post_attention_layernorm"),
            "parallel": ("input_layernorm",),
            "post": ("attention_output_norm", "mlp_output_norm"),
        }
        for name in names.get(str(block), (*names["pre"], *names["post"])):
            made |= normed(name)
        width = layer.ffn_width
        if layer.feed_forward == "channel_mix":
            made |= recurrent_layers.channel_mix_weights(layer, HIDDEN)
            return {name: _renamed(weight, f"{index}.") for name, weight in made.items()}
        if layer.experts:
            made |= mixture_weights(layer)
            return {name: _renamed(weight, f"{index}.") for name, weight in made.items()}
        if gated:
            made |= product("mlp.gate_up_proj", HIDDEN, 2 * width)
        else:
            made |= product("mlp.up_proj", HIDDEN, width)
        made |= product("mlp.down_proj", width, HIDDEN)
        return {name: _renamed(weight, f"{index}.") for name, weight in made.items()}

    final = {"weight": norm("n", HIDDEN)} if scaled else {}
    if shifted:
        final["bias"] = bias(("nb", HIDDEN))
    weights = assemble(
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        layers=layers,
        layer_weights=layer_weights,
        embedding="e",
        final_norm=final,
        head=None if tied else "h",
        head_bias="hb" if biased else None,
    )
    spec = ModelSpec(
        model_type="small",
        hidden_size=HIDDEN,
        head_dim=HEAD,
        vocab_size=VOCAB,
        layers=layers,
        norm_eps=1e-5,
        ropes=ROPES,
        tied=tied,
        max_context=CONTEXT,
        bos=None,
        eos=(),
        pad=None,
        weights=weights,
        conv_width=3,
    )
    return replace(spec, **fields)  # type: ignore[arg-type]


def heads_weights(layer: LayerSpec) -> dict[str, WeightSpec]:
    """The weights of a mixture of attention heads, and the bias that it adds."""
    kv = layer.num_kv_heads * HEAD
    made = {
        "self_attn.router": matrix("router", HIDDEN, ("heads_router", layer.attention_experts)),
        "self_attn.k_proj": matrix("linear", HIDDEN, ("k_proj", kv)),
        "self_attn.v_proj": matrix("linear", HIDDEN, ("v_proj", kv)),
        "self_attn.output.bias": bias(("heads_bias", HIDDEN)),
    }
    for expert in range(layer.attention_experts):
        at = f"heads.{expert}"
        made[f"self_attn.experts.{expert}.q_proj"] = matrix("linear", HIDDEN, (f"{at}.q", kv))
        made[f"self_attn.experts.{expert}.o_proj"] = matrix("linear", kv, (f"{at}.o", HIDDEN))
    return made


def mixture_weights(layer: LayerSpec) -> dict[str, WeightSpec]:
    """The weights of a mixture of experts, and of a shared expert with its gate."""
    made = {"mlp.router": matrix("router", HIDDEN, ("router", layer.experts))}
    parts = [(f"experts.{expert}", layer.ffn_width) for expert in range(layer.experts)]
    if layer.shared_width:
        parts.append(("shared_expert", layer.shared_width))
        made["mlp.shared_expert_gate"] = matrix("router", HIDDEN, ("shared_gate", 1))
    for name, width in parts:
        gate_up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
        made[f"mlp.{gate_up}"] = matrix("linear", HIDDEN, (gate_up, 2 * width))
        made[f"mlp.{down}"] = matrix("linear", width, (down, HIDDEN))
    if layer.attention_experts:
        made["mlp.output.bias"] = bias(("mixture_bias", HIDDEN))
    return made


def _renamed(weight: WeightSpec, before: str) -> WeightSpec:
    """A weight whose checkpoint tensors are those of one layer."""
    pieces = tuple(replace(piece, tensor=before + piece.tensor) for piece in weight.pieces)
    return replace(weight, pieces=pieces)


FACTORS = {
    "attention_scale": 0.3,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
    "clip_qkv": 8.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.2,
    "logit_multiplier": 0.125,
}
SPECS = {
    "plain": small_spec(),
    "everything": small_spec(LAYERS, biased=True, qk_norm=HEAD, **FACTORS),
    "sandwich": small_spec(
        LAYERS, qk_norm=HEAD, block="sandwich", activation="gelu_tanh", tied=False, **FACTORS
    ),
    "post": small_spec(LAYERS, biased=True, qk_norm=-1, block="post"),
    "parallel": small_spec(
        biased=True, shifted=True, tied=False, norm="layer", block="parallel", gated=False,
        activation="gelu",
    ),
    "unscaled": small_spec(LAYERS, scaled=False, norm="layer", clip_qkv=8.0),
    "convolutions": small_spec(LAYERS[3:], biased=True),
    "queries-own": small_spec((replace(FULL, query_rope=1), FULL)),
}  # fmt: skip

# Of many experts a short text chooses few, of some no token any.
MIXED = replace(FULL, experts=8, chosen_experts=2, ffn_width=16)
# Query heads and outputs that are experts', two heads each.
HEADS = replace(FULL, num_heads=6, attention_experts=5, chosen_attention_experts=3)
MIXTURES = {
    "mixture": small_spec((FULL, MIXED), router="normalized_softmax"),
    "shared": small_spec(
        (replace(MIXED, experts=12, chosen_experts=3, shared_width=40), FULL), tied=False
    ),
    "sparse-mixer": small_spec(
        (MIXED, replace(MIXED, window=8)), biased=True, shifted=True, tied=False,
        norm="layer", router="sparse_mixer", router_jitter=0.1,
    ),
    "sandwich": small_spec((MIXED, replace(MIXED, shared_width=24)), block="sandwich"),
    "normalized": small_spec((MIXED, FULL, MIXED), router="normalized_softmax"),
    "biased": small_spec(
        (MIXED,), biased=True, shifted=True, norm="layer", router="normalized_softmax"
    ),
    "heads": small_spec((HEADS, FULL), router="normalized_softmax"),
    "heads-and-mixture": small_spec(
        (replace(HEADS, experts=4, chosen_experts=2, ffn_width=16), HEADS),
        tied=False, router="normalized_softmax",
    ),
    "one-expert": small_spec((replace(MIXED, experts=1, chosen_experts=1),)),
}  # fmt: skip
"""Specs with mixtures of experts."""

RECURRENT = {
    "rwkv5": small_spec((EAGLE, EAGLE), shifted=True, norm="layer", tied=False),
    "rwkv6": small_spec((FINCH, FINCH), shifted=True, norm="layer", tied=False),
    "mamba": small_spec((MAMBA, FULL, MAMBA), conv_width=CONV),
    "mamba-mixture": small_spec((MAMBA, replace(MIXED, rope=None)), conv_width=CONV),
    "delta-net": small_spec((DELTA, FULL, DELTA), conv_width=CONV, tied=False, attention_gate=True),
}
"""Specs with recurrences, of every form."""
