"""What Mamba 2 and the gated delta net share: a convolution before a recurrence, and states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeforge.families.spec import LayerSpec, ModelSpec, convolved_columns
from edgeforge.model.parts import Norm, Projection, Weights
from quant.program import state_ops, token_ops


class ConvolvedRecurrence(nn.Module):
    """The weights and states of a recurrence whose queries, keys and values are convolved first.

    ``in_proj`` gives queries, keys and values side by side, and a gate; ``dt_proj`` each head's
    step, which ``decay`` makes a logarithm of what is kept. The states are the convolution's last
    inputs, ``float[1, columns, conv_width - 1]``, and the memory,
    ``float[1, heads, key_width, value_width]``.
    """

    recent: Tensor
    memory: Tensor

    def __init__(self, spec: ModelSpec, layer: LayerSpec, at: str, context: int) -> None:
        super().__init__()
        made = layer.recurrence
        assert made is not None
        self.made, self.columns = made, convolved_columns(spec, layer)
        self.inner, self.width = made.heads * made.value_width, made.key_heads * made.key_width
        self.in_proj = Projection(spec, f"{at}.in_proj")
        self.dt_proj = Projection(spec, f"{at}.dt_proj")
        self.conv = Weights(spec, f"{at}.conv")
        self.decay = Weights(spec, f"{at}.decay")
        self.norm = Norm(spec, f"{at}.norm")
        self.out_proj = Projection(spec, f"{at}.out_proj")
        recent = torch.zeros(1, self.columns, spec.conv_width - 1, device="meta")
        self.register_buffer("recent", recent)
        memory = torch.zeros(1, made.heads, made.key_width, made.value_width, device="meta")
        self.register_buffer("memory", memory)

    def convolved(self, packed: Tensor, position: Tensor) -> Tensor:
        """Convolves queries, keys and values over the last few tokens: ``float[1, t, columns]``."""
        packed = state_ops.short_conv(packed, self.conv.weight, self.recent, position)
        if self.conv.bias is not None:
            packed = token_ops.bias(packed, self.conv.bias)
        return F.silu(packed)
