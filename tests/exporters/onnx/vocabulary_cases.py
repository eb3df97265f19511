"""Specs that together have every operator and every way of building a layer, to be lowered."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from edgeforge.families.assembly import assemble, bias, convolution, matrix, norm
from edgeforge.families.expert_weights import ExpertNames, expert_weights
from edgeforge.families.spec import LayerSpec, ModelSpec, RecurrenceSpec, RopeSpec
from exporters.target import Lowered
from tests.oracles import recurrent_layers
from tests.oracles.lowered_spec import LoweredSpec
from tests.oracles.traced import ReferenceSession

HIDDEN, HEAD, VOCAB, FFN, CONTEXT = 64, 16, 96, 96, 48
FLOAT = 2e-4  # of the range of the logits
ROUNDED_ACTIVATIONS = 0.04
ROPES = (
    RopeSpec(10000.0, 16),
    RopeSpec(1e6, 16),
    RopeSpec(10000.0, 16, "linear", factor=2.0),
    RopeSpec(1e5, 8),
)


def layer(window: int = 0, rope: int | None = 0, **more) -> LayerSpec:
    return LayerSpec(4, 2, FFN, window=window, rope=rope, **more)


def mixture(experts: int = 8, chosen_experts: int = 2, **more) -> LayerSpec:
    return layer(experts=experts, chosen_experts=chosen_experts, **more)


def heads(of: int = 5, chosen: int = 3, **more) -> LayerSpec:
    """A layer whose query heads and outputs are experts', two heads each."""
    counts = {"attention_experts": of, "chosen_attention_experts": chosen}
    return replace(layer(**more), num_heads=2 * chosen, **counts)


CONVOLUTION = LayerSpec(0, 0, FFN, mixer="short_conv")


def recurrent(mixer: str, groups: int, rows: int, columns: int, **more) -> LayerSpec:
    made = RecurrenceSpec(4, groups, rows, columns, dynamic=more.pop("dynamic", True))
    return LayerSpec(0, 0, FFN, rope=None, mixer=mixer, recurrence=made, **more)


EAGLE, FINCH = (
    recurrent("time_mix", 4, 16, 16, feed_forward="channel_mix", dynamic=dynamic)
    for dynamic in (False, True)
)
MAMBA, DELTA = recurrent("mamba", 2, 8, 16), recurrent("delta_net", 2, 8, 16)


@dataclass(frozen=True)
class Case:
    """A spec to lower, and the operators that its graph must have and must not have."""

    layers: tuple[LayerSpec, ...] = (layer(), layer())
    biases: bool = False
    head_bias: bool = False
    qk_norm: int = 0
    norms: tuple[str, ...] = ("weight",)
    tied: bool = False
    head_dim: int = HEAD
    given: tuple[tuple[str, object], ...] = ()
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def spec(self) -> ModelSpec:
        given = dict(self.given)
        block, gated = given.get("block", "pre"), given.get("gated", True)
        added = {"pre": ("input_layernorm", "post_attention_layernorm")}
        added["parallel"] = ("input_layernorm",)
        added["post"] = ("attention_output_norm", "mlp_output_norm")
        added["sandwich"] = (*added["pre"], *added["post"])

        def product(name: str, columns: int, rows: int) -> dict:
            made = {name: matrix("linear", columns, (name, rows))}
            return {**made, f"{name}.bias": bias((name, rows))} if self.biases else made

        def weights_of(_: int, of: LayerSpec) -> dict:
            if of.attention_experts:
                made = self._heads(of)
            elif of.mixer == "attention":
                q, k = of.num_heads * self.head_dim, of.num_kv_heads * self.head_dim
                made = product("self_attn.qk_proj", HIDDEN, q + k)
                made |= product("self_attn.v_proj", HIDDEN, k)
                if self.qk_norm:
                    widths = (self.head_dim,) * 2 if self.qk_norm == 1 else (q, k)
                    made["self_attn.q_norm"] = norm("q", widths[0])
                    made["self_attn.k_norm"] = norm("k", widths[1])
                made |= product("self_attn.o_proj", q, HIDDEN)
            elif of.recurrence is not None:
                made = recurrent_layers.mixer_weights(of, HIDDEN)
            else:
                made = product("conv.in_proj", HIDDEN, 3 * HIDDEN)
                made["conv.conv"] = convolution("c", HIDDEN, given["conv_width"])
                if self.biases:
                    made["conv.conv.bias"] = bias(("c", HIDDEN))
                made |= product("conv.out_proj", HIDDEN, HIDDEN)
            for name in added[block]:
                made |= self._norm(name)
            if of.feed_forward == "channel_mix":
                return made | recurrent_layers.channel_mix_weights(of, HIDDEN)
            if of.experts:
                return made | self._mixture(of)
            up = ("mlp.gate_up_proj", 2 * FFN) if gated else ("mlp.up_proj", FFN)
            return made | product(up[0], HIDDEN, up[1]) | product("mlp.down_proj", FFN, HIDDEN)

        weights = assemble(
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            layers=self.layers,
            layer_weights=weights_of,
            embedding="e",
            final_norm={name.rpartition(".")[2] or "weight": w for name, w in self._final()},
            head=None if self.tied else "h",
            head_bias="hb" if self.head_bias else None,
        )
        return ModelSpec(
            model_type="any",
            hidden_size=HIDDEN,
            head_dim=self.head_dim,
            vocab_size=VOCAB,
            layers=self.layers,
            norm_eps=1e-5,
            ropes=ROPES,
            tied=self.tied,
            max_context=CONTEXT,
            bos=None,
            eos=(),
            pad=None,
            weights=weights,
            **given,
        )

    def _heads(self, of: LayerSpec) -> dict:
        kv = of.num_kv_heads * self.head_dim
        made = {
            "self_attn.router": matrix("router", HIDDEN, ("r", of.attention_experts)),
            "self_attn.k_proj": matrix("linear", HIDDEN, ("k", kv)),
            "self_attn.v_proj": matrix("linear", HIDDEN, ("v", kv)),
            "self_attn.output.bias": bias(("o", HIDDEN)),
        }
        for expert in range(of.attention_experts):
            at = f"self_attn.experts.{expert}"
            made[f"{at}.q_proj"] = matrix("linear", HIDDEN, ("q", kv))
            made[f"{at}.o_proj"] = matrix("linear", kv, ("p", HIDDEN))
        return made

    def _mixture(self, of: LayerSpec) -> dict:
        made = expert_weights(0, of, HIDDEN, ExpertNames())
        if of.attention_experts:
            made["mlp.output.bias"] = bias(("b", HIDDEN))
        if of.shared_width:
            shared = "mlp.shared_expert"
            made |= {
                f"{shared}.gate_up_proj": matrix("linear", HIDDEN, ("s", 2 * of.shared_width)),
                f"{shared}.down_proj": matrix("linear", of.shared_width, ("t", HIDDEN)),
                "mlp.shared_expert_gate": matrix("router", HIDDEN, ("g", 1)),
            }
        return made

    def _norm(self, name: str) -> dict:
        made = {name: norm(name, HIDDEN)} if "weight" in self.norms else {}
        return {**made, f"{name}.bias": bias((name, HIDDEN))} if "bias" in self.norms else made

    def _final(self):
        named = self._norm("n")
        return [("weight" if name == "n" else "bias", weight) for name, weight in named.items()]


def of(*given: tuple[str, object], **more) -> Case:
    return Case(given=given, **more)


NORM = ("norm", "layer")
CONV = ("conv_width", 3)
CASES = {
    "biases": Case(biases=True),
    "biases-head-24": Case(biases=True, head_dim=24, head_bias=True, has=("RotaryEmbedding",)),
    "window-and-rope-by-layer": Case(
        (layer(7, 0), layer(0, 1), layer(5, None)), lacks=("RotaryEmbedding",)
    ),
    "query-rope": Case((layer(query_rope=2), layer(9, 0, query_rope=2)), has=("RotaryEmbedding",)),
    "no-rope": Case((layer(0, None), layer(3, None)), lacks=("RotaryEmbedding",)),
    "qk-norm-heads": Case(qk_norm=1),
    "qk-norm-whole": of(qk_norm=2, has=("RMSNormalization",)),
    "layer-norm": of(NORM, norms=("weight", "bias"), has=("SkipLayerNormalization",)),
    "layer-norm-no-bias": of(NORM, has=("SkipLayerNormalization", "LayerNormalization")),
    "layer-norm-bare": of(NORM, norms=(), has=("SkipLayerNormalization",)),
    "sandwich": of(("block", "sandwich"), has=("SkipSimplifiedLayerNormalization",)),
    "post": of(("block", "post"), qk_norm=2, has=("Add",)),
    "parallel": of(("block", "parallel"), has=("SkipSimplifiedLayerNormalization", "Add")),
    "phi": of(
        ("block", "parallel"),
        NORM,
        ("gated", False),
        ("activation", "gelu_tanh"),
        biases=True,
        head_bias=True,
        layers=(layer(rope=3), layer(rope=3)),
        norms=("weight", "bias"),
        has=("Gelu",),
        lacks=("QuickGelu",),
    ),
    "gelu-tanh": of(("activation", "gelu_tanh"), has=("Gelu",), lacks=("QuickGelu",)),
    "gelu": of(("activation", "gelu"), has=("Gelu",), lacks=("QuickGelu",)),
    "scales": of(
        ("attention_scale", 0.3),
        ("embedding_multiplier", 7.5),
        ("residual_multiplier", 0.22),
        ("logit_multiplier", 0.125),
        tied=True,
    ),
    "softcaps": of(
        ("attention_softcap", 2.0),
        ("logit_softcap", 3.0),
        layers=(layer(6), layer()),
        has=("Tanh",),
    ),
    "clip": of(("clip_qkv", 0.8), has=("Clip",)),
    "gemma": of(
        ("block", "sandwich"),
        ("activation", "gelu_tanh"),
        ("attention_softcap", 5.0),
        ("logit_softcap", 3.0),
        ("embedding_multiplier", 8.0),
        layers=(layer(6, 1), layer()),
        head_dim=256,
        qk_norm=1,
        tied=True,
    ),
    "short-conv": of(CONV, layers=(CONVOLUTION, layer()), qk_norm=1, tied=True),
    # A mixture between dense layers, one that begins, and one that ends: the last layer's experts
    # are computed for the last token alone.
    "mixture": of(
        ("router", "normalized_softmax"),
        layers=(mixture(), layer(), mixture(6, 3)),
        has=("TopK",),
    ),
    "mixture-shared": of(
        ("activation", "gelu"),
        ("residual_multiplier", 0.5),
        layers=(mixture(16, 4, shared_width=64), mixture(4, 1)),
        has=("TopK", "Sigmoid"),
    ),
    "mixture-sparse-mixer": of(
        NORM,
        ("router", "sparse_mixer"),
        ("router_jitter", 0.1),
        layers=(mixture(), mixture(3)),
        norms=("weight", "bias"),
        has=("TopK", "GatherElements"),
    ),
    # A mixture of heads before a dense layer, and one that ends: the last layer's queries are
    # computed for all tokens, and its outputs for the last one alone.
    "heads": of(
        ("router", "normalized_softmax"),
        layers=(heads(), layer()),
        has=("TopK", "GroupQueryAttention"),
    ),
    "heads-and-mixture": of(
        ("router", "normalized_softmax"),
        layers=(
            heads(4, 2, experts=6, chosen_experts=2),
            heads(4, 2, rope=3, experts=4, chosen_experts=2),
            heads(8, 2),
        ),
        has=("TopK",),
    ),
    # Layers that begin and end with a recurrence: the last one's output is the last token's alone.
    **{
        name: of(
            NORM,
            layers=(layer, layer),
            norms=("weight", "bias"),
            has=("If", "Slice"),
            lacks=("GroupQueryAttention",),
        )
        for name, layer in (("rwkv5", EAGLE), ("rwkv6", FINCH))
    },
    "mamba": of(("conv_width", 4), layers=(MAMBA, layer(), MAMBA), has=("If", "Softplus")),
    "mamba-mixture": of(
        ("conv_width", 4),
        ("router", "normalized_softmax"),
        layers=(recurrent("mamba", 1, 16, 8, experts=4, chosen_experts=2), mixture(4)),
        has=("If", "TopK"),
    ),
    "delta-net": of(("conv_width", 4), layers=(DELTA, layer(), DELTA), has=("If", "Sigmoid")),
    "short-conv-5-biases": of(
        ("conv_width", 5), layers=(layer(), CONVOLUTION), biases=True, norms=("weight",)
    ),
}


@dataclass(frozen=True)
class Made:
    """An artifact of a case, and what its program means."""

    case: Case
    folder: Path
    lowered: Lowered
    reference: ReferenceSession
    source: LoweredSpec

    def operators(self) -> Counter[str]:
        graph = onnx.load(self.folder / "model.onnx", load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)


QUANTIZED = [
    *(("int4-g32", name) for name in CASES),
    *(("int8", name) for name in ("biases", "phi", "gemma", "short-conv-5-biases", "mixture")),
    ("int8", "heads-and-mixture"),
    *(("int8", name) for name in ("rwkv6", "mamba", "delta-net")),
]


def with_accuracy_level(source: Path, folder: Path, level: int) -> Path:
    """A copy of an artifact whose matrix products round activations to another type, or none."""
    shutil.copytree(source, folder)
    for name in ("model.onnx", "verify.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = level
        onnx.save(model, folder / name)
    return folder
