"""The decoder module that is traced: pre-norm attention and a gated feed-forward in each layer.

It uses only the ``edgeforge::`` operators and a few ATen views. It is built on the meta device, so
a model of any size takes no memory here. Submodules are named so that ``state_dict`` keys are the
weight names of `edgeforge.families.spec.ModelSpec`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeforge.families.spec import LayerSpec, ModelSpec
from quant.program import ops


class Weight(nn.Module):
    """A module with one parameter called ``weight``, on the meta device."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Attention(nn.Module):
    """Grouped-query self-attention with a key/value cache.

    ``float[1, t, hidden], int64[1] -> float[1, t, hidden]``; the caches are
    ``float[1, kv_heads, context, head_dim]``.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, context: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        width = layer.num_heads * spec.head_dim
        shared = layer.num_kv_heads * spec.head_dim
        self.qk_proj = Weight(width + shared, spec.hidden_size)
        self.v_proj = Weight(shared, spec.hidden_size)
        if spec.qk_norm:
            self.q_norm = Weight(spec.head_dim)
            self.k_norm = Weight(spec.head_dim)
        self.o_proj = Weight(spec.hidden_size, width)
        cache = torch.zeros(1, layer.num_kv_heads, context, spec.head_dim, device="meta")
        self.register_buffer("k_cache", cache)
        self.register_buffer("v_cache", torch.zeros_like(cache))
        # A window as wide as the context masks nothing, so the program can do without it.
        self.window = spec.window if spec.window < context else 0

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        """Attends from each token to itself and to the tokens before it."""
        spec, layer, t = self.spec, self.layer, x.shape[1]
        heads = (layer.num_heads, layer.num_kv_heads)
        packed = ops.linear(x, self.qk_proj.weight)
        q, k = (
            part.view(1, t, count, spec.head_dim)
            for part, count in zip(
                packed.split([n * spec.head_dim for n in heads], -1), heads, strict=True
            )
        )
        v = ops.linear(x, self.v_proj.weight).view(1, t, layer.num_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q = ops.rms_norm(q, self.q_norm.weight, spec.norm_eps)
            k = ops.rms_norm(k, self.k_norm.weight, spec.norm_eps)
        q, k = ops.rope(q, cos, sin, position), ops.rope(k, cos, sin, position)
        mixed = ops.attention(
            q, k, v, self.k_cache, self.v_cache, position, self.window, spec.head_dim**-0.5
        )
        out: Tensor = ops.linear(mixed, self.o_proj.weight)
        return out


class GatedFeedForward(nn.Module):
    """``down(silu(gate) * up)`` (Shazeer 2020): ``float[1, t, hidden] -> float[1, t, hidden]``."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.gate_up_proj = Weight(2 * layer.ffn_width, spec.hidden_size)
        self.down_proj = Weight(spec.hidden_size, layer.ffn_width)
        self.width = layer.ffn_width

    def forward(self, x: Tensor) -> Tensor:
        """Transforms each token on its own."""
        gate, up = ops.linear(x, self.gate_up_proj.weight).split([self.width, self.width], -1)
        out: Tensor = ops.linear(F.silu(gate) * up, self.down_proj.weight)
        return out


class Layer(nn.Module):
    """A pre-norm block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, context: int) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.input_layernorm = Weight(spec.hidden_size)
        self.self_attn = Attention(spec, layer, context)
        self.post_attention_layernorm = Weight(spec.hidden_size)
        self.mlp = GatedFeedForward(spec, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        """Applies attention and feed-forward, each with its norm and residual."""
        normed = ops.rms_norm(x, self.input_layernorm.weight, self.eps)
        x = x + self.self_attn(normed, cos, sin, position)
        normed = ops.rms_norm(x, self.post_attention_layernorm.weight, self.eps)
        out: Tensor = x + self.mlp(normed)
        return out


class Trunk(nn.Module):
    """All weights except the head's; checkpoints give their names the prefix ``model.``."""

    def __init__(self, spec: ModelSpec, context: int) -> None:
        super().__init__()
        self.embed_tokens = Weight(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, layer, context) for layer in spec.layers)
        self.norm = Weight(spec.hidden_size)
        if spec.norm_matrix:
            self.norm_matrix = Weight(spec.hidden_size, spec.hidden_size)


class Decoder(nn.Module):
    """A causal language model with its caches as buffers.

    Args:
        spec: the dimensions.
        context: length of the caches and of the rotary tables, tokens.

    ``forward``: ``int64[1, t], int64[1] -> float32[1, t, vocab]``, the logits of every position.
    """

    def __init__(self, spec: ModelSpec, context: int) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec, context)
        if not spec.tied:
            self.lm_head = Weight(spec.vocab_size, spec.hidden_size)
        table = torch.empty(context, spec.rope.width // 2, device="meta")
        self.register_buffer("rope_cos", table)
        self.register_buffer("rope_sin", torch.empty_like(table))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Returns the logits of every position."""
        trunk = self.model
        x = ops.embedding(tokens, trunk.embed_tokens.weight)
        for layer in trunk.layers:
            x = layer(x, self.rope_cos, self.rope_sin, position)
        x = ops.rms_norm(x, trunk.norm.weight, self.spec.norm_eps)
        if self.spec.norm_matrix:
            x = ops.linear(x, trunk.norm_matrix.weight)
        head = trunk.embed_tokens if self.spec.tied else self.lm_head
        logits: Tensor = ops.linear(x, head.weight)
        return logits
