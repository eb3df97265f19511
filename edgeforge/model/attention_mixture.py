"""A mixture of attention heads, as JetMoE has it (arXiv 2210.05144, arXiv 2404.07413).

A router chooses a few experts for each token. Each has a matrix of queries and one of outputs.
Keys and values, and so the caches, are one for all: an expert has a query head for each key/value
head. What attention gives for an expert's queries goes through the expert's own output matrix, and
the results are added up by the token's weights of them.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.model.cached_attention import CachedAttention
from edgeforge.model.parts import Projection, StackedExperts, Weights, routed
from quant.program import expert_ops, ops, token_ops

HEAD_PARTS: Final = ("q_proj", "o_proj")
"""The names of an attention expert's matrices."""


class AttentionMixture(CachedAttention):
    """Attention whose query heads are experts, with a key/value cache.

    ``float[1, t, hidden], int64[1] -> float[1, t, hidden]``; the caches are
    ``float[1, kv_heads, context, head_dim]``.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__(spec, layer, context)
        self.router = Projection(spec, f"{at}.router")
        self.k_proj = Projection(spec, f"{at}.k_proj")
        self.v_proj = Projection(spec, f"{at}.v_proj")
        self.experts = StackedExperts(spec, f"{at}.experts", layer.attention_experts, HEAD_PARTS)
        self.output = Weights(spec, f"{at}.output")

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Attends from each token to itself and to the tokens before it."""
        spec, layer, matrices = self.spec, self.layer, self.experts.get_parameter
        chosen, heads, width = layer.chosen_attention_experts, layer.num_kv_heads, spec.head_dim
        weights = routed(spec, self.router(x), chosen)
        q = expert_ops.expert_queries(x, weights, matrices("q_proj"), chosen, heads)
        k, v = self.k_proj(x), self.v_proj(x)
        q = q.view(1, q.shape[1], layer.num_heads, width)
        k, v = (each.view(1, each.shape[1], heads, width) for each in (k, v))
        if layer.rope is not None:
            cos, sin = tables[2 * layer.rope : 2 * layer.rope + 2]
            q, k = (ops.rope(each, cos, sin, position) for each in (q, k))
        mixed = self.attend(q, k, v, position)
        made: Tensor = expert_ops.expert_outputs(mixed, weights, matrices("o_proj"), chosen, heads)
        return made if self.output.bias is None else token_ops.bias(made, self.output.bias)
