"""Products of matrices, and attention."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Operation, Tensors
from device_harness.coreml_interpreter.weights import Weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]`` by ``weight [out, in]``, and ``bias [out]``."""
    return weight.linear(x, bias)


def matmul(x: Tensor, y: Weight, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Product of the last two dimensions, others broadcast; vectors as NumPy takes them."""
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and len(y.shape) == 2 and x.dim() > 1:
        return y.linear(x)
    other = y.tensor()
    return torch.matmul(x, other.transpose(-1, -2) if transpose_y and other.dim() > 1 else other)


def einsum(values: Tensors, equation: str) -> Tensor:
    """Two tensors multiplied as an equation says, dimensions of one broadcast."""
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """``softmax(query @ key.T / sqrt(E) + mask) @ value``.

    Args:
        query: ``[B, ..., L, E]``.
        key: ``[B, ..., S, E]``.
        value: ``[B, ..., S, EV]``.
        attn_mask: floats that are added, or booleans that say which positions take part,
            broadcast to ``[B, ..., L, S]``.
    """
    scores = torch.matmul(query * (1 / math.sqrt(query.shape[-1])), key.transpose(-1, -2))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


OPS: Final[dict[str, Operation]] = {
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
