"""The gated delta net (arXiv 2412.06464): a recurrence whose values replace what a key finds."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeforge.families.spec import LayerSpec, ModelSpec, convolved_columns
from edgeforge.model.parts import Norm, Projection, Weights
from quant.program import recurrence_ops, state_ops, token_ops

UNIT_EPS: Final = 1e-6
"""Epsilon of the norm that gives queries and keys the length 1."""


class DeltaNet(nn.Module):
    """A gated delta net: ``float[1, t, hidden] -> float[1, t, hidden]``.

    ``in_proj`` gives queries, keys and values side by side, and the gate; ``beta_proj`` how far a
    value replaces, ``dt_proj``, whose bias is the checkpoint's ``dt_bias``, each head's step. The
    states are the convolution's last inputs, ``float[1, columns, conv_width - 1]``, and the
    memory, ``float[1, heads, key_width, value_width]``.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__()
        made = layer.recurrence
        assert made is not None
        self.made, self.columns = made, convolved_columns(spec, layer)
        self.inner = made.heads * made.value_width
        self.in_proj = Projection(spec, f"{at}.in_proj")
        self.beta_proj = Projection(spec, f"{at}.beta_proj")
        self.dt_proj = Projection(spec, f"{at}.dt_proj")
        self.conv = Weights(spec, f"{at}.conv")
        self.decay = Weights(spec, f"{at}.decay")
        self.norm = Norm(spec, f"{at}.norm")
        self.out_proj = Projection(spec, f"{at}.out_proj")
        recent = torch.zeros(1, self.columns, spec.conv_width - 1, device="meta")
        self.register_buffer("recent", recent)
        memory = torch.zeros(1, made.heads, made.key_width, made.value_width, device="meta")
        self.register_buffer("memory", memory)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Mixes each token with those before it."""
        count, made = x.shape[1], self.made
        packed, gate = self.in_proj(x).split([self.columns, self.inner], -1)
        packed = state_ops.short_conv(packed, self.conv.weight, self.recent, position)
        if self.conv.bias is not None:
            packed = token_ops.bias(packed, self.conv.bias)
        width = made.key_heads * made.key_width
        q, k, v = torch.split(F.silu(packed), [width, width, self.inner], -1)
        q, k = (
            token_ops.l2_norm(x.view(1, count, made.key_heads, made.key_width), UNIT_EPS)
            for x in (q, k)
        )
        step = F.softplus(self.dt_proj(x))
        found = recurrence_ops.recurrence(
            token_ops.scale(q, made.key_width**-0.5),
            k,
            v.view(1, count, made.heads, made.value_width),
            token_ops.gain(step, self.decay.weight),
            None,
            torch.sigmoid(self.beta_proj(x)),
            self.memory,
            position,
        )
        normed = self.norm(found).view(1, count, self.inner)
        out: Tensor = self.out_proj(normed * F.silu(gate))
        return out
