"""Mamba 2 (arXiv 2405.21060): a convolution, and a recurrence whose decay each token decides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.model.convolved_recurrence import ConvolvedRecurrence
from edgeforge.model.parts import Weights
from quant.program import recurrence_ops, token_ops


class Mamba(ConvolvedRecurrence):
    """Mamba 2's mix of tokens: ``float[1, t, hidden] -> float[1, t, hidden]``.

    ``in_proj`` gives the gate, and values, keys and queries side by side (x, B and C);
    ``dt_proj``, whose bias is the checkpoint's ``dt_bias``, gives each head its step. Where the
    products have biases of their own, ``dt_bias`` is ``step.bias``. The norm is of the values that
    share a head of queries and keys.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__(spec, layer, at, context)
        self.step = Weights(spec, f"{at}.step")
        self.skip = Weights(spec, f"{at}.skip")

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Mixes each token with those before it."""
        count, made = x.shape[1], self.made
        gate, packed = self.in_proj(x).split([self.inner, self.columns], -1)
        parts = [self.inner, self.width, self.width]
        v, k, q = torch.split(self.convolved(packed, position), parts, -1)
        steps = self.dt_proj(x)
        if self.step.bias is not None:
            steps = token_ops.bias(steps, self.step.bias)
        step = F.softplus(steps)
        q, k = (x.view(1, count, made.key_heads, made.key_width) for x in (q, k))
        v = v.view(1, count, made.heads, made.value_width)
        found = recurrence_ops.recurrence(
            q,
            k,
            v * step.view(1, count, made.heads, 1),
            token_ops.gain(step, self.decay.weight),
            None,
            None,
            self.memory,
            position,
        )
        found = (found + token_ops.gain(v, self.skip.weight)).view(1, count, self.inner)
        out: Tensor = self.out_proj(self._normed(found * F.silu(gate)))
        return out

    def _normed(self, x: Tensor) -> Tensor:
        """RMS-normalises the values of each head of queries and keys: ``float[1, t, inner]``."""
        groups = self.made.key_heads
        if groups == 1:
            whole: Tensor = self.norm(x)
            return whole
        width = self.inner // groups
        parts = x.view(1, x.shape[1], groups, width)
        parts = token_ops.scale(token_ops.l2_norm(parts, self.norm.eps * width), width**0.5)
        flat = parts.view(1, x.shape[1], self.inner)
        normed: Tensor = token_ops.gain(flat, self.norm.weight)
        return normed
