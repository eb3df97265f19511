"""Products of matrices, and attention."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Operation, Tensors
from device_harness.coreml_interpreter.weights import Weight

_MANY_QUERIES: Final = 16  # for fewer, looking at the mask takes longer than it saves
_NO_FLOAT32: Final = 110.0  # exp(-110) is 0 in float32


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
    if attn_mask is not None and query.shape[-2] >= _MANY_QUERIES:
        stop = _used(query, key, attn_mask)
        key, value = key[..., :stop, :], value[..., :stop, :]
        attn_mask = attn_mask[..., :stop] if attn_mask.shape[-1] > 1 else attn_mask
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def _used(query: Tensor, key: Tensor, mask: Tensor) -> int:
    """Where the positions end that any query looks at: the empty end of a cache takes no part.

    A position is left out only when its weight is exactly 0 for every query: when its score, at
    most the product of the longest query and the longest key, lies so far below a row's largest
    that its exponential is no float32.
    """
    rows = mask.reshape(-1, mask.shape[-1])
    if mask.dtype == torch.bool:
        wanted = rows.any(0)
    else:
        bound = query.norm(dim=-1).amax() * key.norm(dim=-1).amax() / math.sqrt(query.shape[-1])
        least = rows.amax(1).amin() - 2 * bound - _NO_FLOAT32
        wanted = ~(rows.amax(0) < least)
    places = wanted.nonzero()
    return int(places[-1]) + 1 if len(places) and len(wanted) == key.shape[-2] else key.shape[-2]


OPS: Final[dict[str, Operation]] = {
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
