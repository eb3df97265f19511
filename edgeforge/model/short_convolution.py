"""The gated short convolution of LFM2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.model.parts import Projection, Weights
from quant.program import state_ops, token_ops


class ShortConvolution(nn.Module):
    """A gated short convolution (LFM2): ``float[1, t, hidden] -> float[1, t, hidden]``.

    Three parts of one product are ``b``, ``c`` and ``x``; the result is
    ``out(c * convolution(b * x))``. The state is ``float[1, hidden, width - 1]``.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__()
        self.width = spec.hidden_size
        self.in_proj = Projection(spec, f"{at}.in_proj")
        self.conv = Weights(spec, f"{at}.conv")
        self.out_proj = Projection(spec, f"{at}.out_proj")
        recent = torch.zeros(1, spec.hidden_size, spec.conv_width - 1, device="meta")
        self.register_buffer("recent", recent)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], position: Tensor) -> Tensor:
        """Mixes each token with the few before it."""
        b, c, x = self.in_proj(x).split([self.width] * 3, -1)
        mixed = state_ops.short_conv(b * x, self.conv.weight, self.recent, position)
        if self.conv.bias is not None:
            mixed = token_ops.bias(mixed, self.conv.bias)
        out: Tensor = self.out_proj(c * mixed)
        return out
