"""The decoder module that is traced, written once for every family.

`edgeforge.families.spec.ModelSpec` says what a layer consists of, and its map of weights says which
biases and norms there are. The module uses only the ``edgeforge::`` operators and a few ATen views.
It is built on the meta device, so a model of any size takes no memory here. Submodules are named so
that ``state_dict`` keys are the weight names of the spec, but for those of
`edgeforge.model.parts.StackedExperts`.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeforge.families.spec import LayerSpec, Mixer, ModelSpec
from edgeforge.model.attention_mixture import AttentionMixture
from edgeforge.model.cached_attention import CachedAttention
from edgeforge.model.delta_net import DeltaNet
from edgeforge.model.mamba import Mamba
from edgeforge.model.parts import Norm, Projection, StackedExperts, Weights, routed
from edgeforge.model.rwkv import ChannelMix, TimeMix
from edgeforge.model.short_convolution import ShortConvolution
from quant.program import expert_ops, ops, token_ops

EXPERT_PARTS: Final = ("gate_up_proj", "down_proj")
"""The names of an expert's matrices."""


class Attention(CachedAttention):
    """Grouped-query self-attention with a key/value cache.

    ``float[1, t, hidden], int64[1] -> float[1, t, hidden]``; the caches are
    ``float[1, kv_heads, context, head_dim]``.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__(spec, layer, context)
        self.qk_proj = Projection(spec, f"{at}.qk_proj")
        self.v_proj = Projection(spec, f"{at}.v_proj")
        self.q_norm = Weights(spec, f"{at}.q_norm")
        self.k_norm = Weights(spec, f"{at}.k_norm")
        self.gate_proj = Projection(spec, f"{at}.gate_proj")
        self.o_proj = Projection(spec, f"{at}.o_proj")
        scale = self.q_norm.weight
        self.whole_norm = scale is not None and scale.shape[0] != spec.head_dim

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Attends from each token to itself and to the tokens before it."""
        spec, layer = self.spec, self.layer
        heads = (layer.num_heads, layer.num_kv_heads)
        packed, v = self.qk_proj(x), self._bounded(self.v_proj(x))
        if not self.whole_norm:
            packed = self._bounded(packed)
        q, k = packed.split([n * spec.head_dim for n in heads], -1)
        q, k = self._heads(q, self.q_norm, heads[0]), self._heads(k, self.k_norm, heads[1])
        v = v.view(1, v.shape[1], layer.num_kv_heads, spec.head_dim)
        if layer.rope is not None:
            own = layer.rope if layer.query_rope is None else layer.query_rope
            q = ops.rope(q, tables[2 * own], tables[2 * own + 1], position)
            k = ops.rope(k, tables[2 * layer.rope], tables[2 * layer.rope + 1], position)
        mixed = self.attend(q, k, v, position)
        if self.gate_proj.weight is not None:
            mixed = mixed * F.sigmoid(self.gate_proj(x))
        out: Tensor = self.o_proj(mixed)
        return out

    def _heads(self, x: Tensor, norm: Weights, count: int) -> Tensor:
        """Queries or keys head by head, normalised before or after they are parted."""
        width, eps, weight = self.spec.head_dim, self.spec.norm_eps, norm.weight
        if self.whole_norm:
            x = self._bounded(ops.rms_norm(x, weight, eps))
        x = x.view(1, x.shape[1], count, width)
        if weight is not None and not self.whole_norm:
            x = ops.rms_norm(x, weight, eps)
        return x

    def _bounded(self, x: Tensor) -> Tensor:
        return token_ops.clamp(x, self.spec.clip_qkv) if self.spec.clip_qkv else x


class FeedForward(nn.Module):
    """``down(act(gate) * up)`` (Shazeer 2020) or ``down(act(up))``: ``float[1, t, hidden]``."""

    def __init__(self, spec: ModelSpec, width: int, at: str) -> None:
        super().__init__()
        self.activation, self.gated, self.width = spec.activation, spec.gated, width
        if spec.gated:
            self.gate_up_proj = Projection(spec, f"{at}.gate_up_proj")
        else:
            self.up_proj = Projection(spec, f"{at}.up_proj")
        self.down_proj = Projection(spec, f"{at}.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """Transforms each token on its own."""
        if self.gated:
            gate, up = self.gate_up_proj(x).split([self.width, self.width], -1)
            made = self._activate(gate) * up
        else:
            made = self._activate(self.up_proj(x))
        out: Tensor = self.down_proj(made)
        return out

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(x)
        made: Tensor = token_ops.gelu(x, "tanh" if self.activation == "gelu_tanh" else "none")
        return made


class Mixture(nn.Module):
    """A mixture of experts, and the shared one that every token has, if any.

    ``float[1, t, hidden] -> float[1, t, hidden]``.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.router = Projection(spec, f"{at}.router")
        self.experts = StackedExperts(spec, f"{at}.experts", layer.experts, EXPERT_PARTS)
        self.output = Weights(spec, f"{at}.output")
        if layer.shared_width:
            self.shared_expert = FeedForward(spec, layer.shared_width, f"{at}.shared_expert")
            self.shared_expert_gate = Weights(spec, f"{at}.shared_expert_gate")

    def forward(self, x: Tensor) -> Tensor:
        """Transforms each token on its own, by the experts that it chooses."""
        spec = self.spec
        weights = routed(spec, self.router(x), self.layer.chosen_experts)
        made: Tensor = expert_ops.experts(
            x,
            weights,
            *(self.experts.get_parameter(part) for part in EXPERT_PARTS),
            spec.activation,
        )
        if self.output.bias is not None:
            made = token_ops.bias(made, self.output.bias)
        if not self.layer.shared_width:
            return made
        shared: Tensor = self.shared_expert(x)
        if self.shared_expert_gate.weight is not None:
            shared = F.sigmoid(ops.linear(x, self.shared_expert_gate.weight)) * shared
        return made + shared


MIXERS: Final[dict[Mixer, tuple[str, type[nn.Module]]]] = {
    "attention": ("self_attn", Attention),
    "short_conv": ("conv", ShortConvolution),
    "time_mix": ("time_mix", TimeMix),
    "mamba": ("mamba", Mamba),
    "delta_net": ("linear_attn", DeltaNet),
}
"""What mixes tokens in a layer, by `LayerSpec.mixer`: its name within the layer, and its module.

Each is made of the model's spec, the layer's, its name and the context, and called with
``float[1, t, hidden]``, the rotary tables and the position."""


class Layer(nn.Module):
    """A mixer of tokens and a feed-forward part, with norms and sums as `ModelSpec.block` says."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, index: int, context: int) -> None:
        super().__init__()
        at = f"model.layers.{index}"
        self.block, self.multiplier = spec.block, spec.residual_multiplier
        if spec.block != "post":
            self.input_layernorm = Norm(spec, f"{at}.input_layernorm")
        self.mixer, kind = MIXERS[layer.mixer]
        if layer.attention_experts:
            kind = AttentionMixture
        self.add_module(self.mixer, kind(spec, layer, f"{at}.{self.mixer}", context))
        if spec.block in ("sandwich", "post"):
            self.attention_output_norm = Norm(spec, f"{at}.attention_output_norm")
            self.mlp_output_norm = Norm(spec, f"{at}.mlp_output_norm")
        if spec.block in ("pre", "sandwich"):
            self.post_attention_layernorm = Norm(spec, f"{at}.post_attention_layernorm")
        self.shifted = layer.feed_forward == "channel_mix"
        if self.shifted:
            self.mlp: nn.Module = ChannelMix(spec, f"{at}.mlp")
        elif layer.experts:
            self.mlp = Mixture(spec, layer, f"{at}.mlp")
        else:
            self.mlp = FeedForward(spec, layer.ffn_width, f"{at}.mlp")

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Applies mixer and feed-forward part, each with its norms and residual."""
        normed = x if self.block == "post" else self.input_layernorm(x)
        added = self.get_submodule(self.mixer)(normed, tables, position)
        if self.block == "parallel":
            return x + self._scaled(added) + self._scaled(self.mlp(normed))
        if self.block != "pre":
            added = self.attention_output_norm(added)
        x = x + self._scaled(added)
        normed = x if self.block == "post" else self.post_attention_layernorm(x)
        added = self.mlp(normed, position) if self.shifted else self.mlp(normed)
        if self.block != "pre":
            added = self.mlp_output_norm(added)
        return x + self._scaled(added)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1 else token_ops.scale(x, self.multiplier)


class Trunk(nn.Module):
    """All weights except the head's; checkpoints give their names the prefix ``model.``."""

    def __init__(self, spec: ModelSpec, context: int) -> None:
        super().__init__()
        self.embed_tokens = Weights(spec, "model.embed_tokens")
        if "model.embedding_norm.weight" in spec.weights:
            self.embedding_norm = Norm(spec, "model.embedding_norm")
        self.layers = nn.ModuleList(
            Layer(spec, layer, index, context) for index, layer in enumerate(spec.layers)
        )
        self.norm = Norm(spec, "model.norm")
        if spec.norm_matrix:
            self.norm_matrix = Projection(spec, "model.norm_matrix")


class Decoder(nn.Module):
    """A causal language model with its states as buffers.

    Args:
        spec: the dimensions.
        context: length of the caches and of the rotary tables, tokens.

    ``forward``: ``int64[1, t], int64[1] -> float32[1, t, vocab]``, the logits of every position.
    """

    def __init__(self, spec: ModelSpec, context: int) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec, context)
        self.lm_head = Weights(spec, "lm_head")
        self.tables = [name for index in range(len(spec.ropes)) for name in table_names(index)]
        for index, rope in enumerate(spec.ropes):
            for name in table_names(index):
                self.register_buffer(name, torch.empty(context, rope.width // 2, device="meta"))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Returns the logits of every position."""
        spec, trunk = self.spec, self.model
        x = ops.embedding(tokens, trunk.embed_tokens.weight)
        if spec.embedding_multiplier != 1:
            x = token_ops.scale(x, spec.embedding_multiplier)
        if "model.embedding_norm.weight" in spec.weights:
            x = trunk.embedding_norm(x)
        tables = tuple(self.get_buffer(name) for name in self.tables)
        for layer in trunk.layers:
            x = layer(x, tables, position)
        x = trunk.norm(x)
        if spec.norm_matrix:
            x = trunk.norm_matrix(x)
        logits: Tensor = ops.linear(x, (trunk.embed_tokens if spec.tied else self.lm_head).weight)
        if self.lm_head.bias is not None:
            logits = token_ops.bias(logits, self.lm_head.bias)
        if spec.logit_multiplier != 1:
            logits = token_ops.scale(logits, spec.logit_multiplier)
        return token_ops.softcap(logits, spec.logit_softcap) if spec.logit_softcap else logits


def table_names(index: int) -> tuple[str, str]:
    """Returns the names of a rotary embedding's tables of cosines and sines.

    >>> table_names(0), table_names(1)
    (('rope_cos', 'rope_sin'), ('rope_cos_1', 'rope_sin_1'))
    """
    suffix = f"_{index}" if index else ""
    return f"rope_cos{suffix}", f"rope_sin{suffix}"


def is_stacked(parameter: str) -> bool:
    """Returns whether a parameter of the module stacks the matrices of a mixture's experts.

    >>> is_stacked("model.layers.0.mlp.experts.down_proj")
    True
    """
    return parameter.rpartition(".")[0].endswith(".experts")
