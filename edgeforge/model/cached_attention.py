"""What every attention has: caches of keys and values, and the operator that reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeforge.families.spec import LayerSpec, ModelSpec
from quant.program import state_ops


class CachedAttention(nn.Module):
    """Attention to a text of which keys and values are kept.

    The caches are ``float[1, kv_heads, context, head_dim]``.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, context: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        cache = torch.zeros(1, layer.num_kv_heads, context, spec.head_dim, device="meta")
        self.register_buffer("k_cache", cache)
        self.register_buffer("v_cache", torch.zeros_like(cache))
        # A window as wide as the context masks nothing, so the program can do without it.
        self.window = layer.window if layer.window < context else 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """Attends from each token to itself and to the tokens before it.

        Args:
            q: queries, ``float[1, t, heads, head_dim]``.
            k: new keys, ``float[1, t, kv_heads, head_dim]``.
            v: new values, likewise.
            position: of the first token, ``int64[1]``.

        Returns:
            ``float[1, t, heads * head_dim]``.
        """
        made: Tensor = state_ops.attention(
            q,
            k,
            v,
            self.k_cache,
            self.v_cache,
            position,
            self.window,
            self.spec.scale,
            self.spec.attention_softcap,
        )
        return made
