"""The gated delta net (arXiv 2412.06464): a recurrence whose values replace what a key finds."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.model.convolved_recurrence import ConvolvedRecurrence
from edgeforge.model.parts import Projection
from quant.program import recurrence_ops, token_ops

UNIT_EPS: Final = 1e-6
"""Epsilon of the norm that gives queries and keys the length 1."""


class DeltaNet(ConvolvedRecurrence):
    """A gated delta net: ``float[1, t, hidden] -> float[1, t, hidden]``.

    ``in_proj`` gives queries, keys and values side by side, and the gate; ``beta_proj`` how far a
    value replaces, ``dt_proj``, whose bias is the checkpoint's ``dt_bias``, each head's step.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__(spec, layer, at, context)
        self.beta_proj = Projection(spec, f"{at}.beta_proj")

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Mixes each token with those before it."""
        count, made = x.shape[1], self.made
        packed, gate = self.in_proj(x).split([self.columns, self.inner], -1)
        parts = [self.width, self.width, self.inner]
        q, k, v = torch.split(self.convolved(packed, position), parts, -1)
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
