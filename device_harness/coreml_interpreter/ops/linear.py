"""Matrix products and attention."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_broadcast
from device_harness.coreml_interpreter.ops.kinds import Operation, Tensors
from device_harness.coreml_interpreter.weights import Weight

_MANY_QUERIES: Final = 16  # with fewer queries, reading the mask takes longer than it saves
_NO_FLOAT32: Final = 110.0  # exp(-110) is 0 in float32


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``x [..., in]``, ``weight [out, in]``, ``bias [out]``."""
    return weight.linear(x, bias)


def matmul(x: Tensor, y: Weight, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """The matrix product over the last two dimensions; the others broadcast, as in NumPy."""
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and len(y.shape) == 2 and x.dim() > 1:
        return y.linear(x)
    other = y.tensor()
    if x.dim() > 1 and other.dim() > 1:
        width = other.shape[-2] if transpose_y else other.shape[-1]
        check_broadcast(x[..., :1].expand(*x.shape[:-1], width), other[..., :1, :1])
    return torch.matmul(x, other.transpose(-1, -2) if transpose_y and other.dim() > 1 else other)


def einsum(values: Tensors, equation: str) -> Tensor:
    """The product of two tensors by an equation; dimensions of size 1 broadcast."""
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """``softmax(query @ key.T / sqrt(E) + mask) @ value``.

    Args:
        query: ``[B, ..., L, E]``.
        key: ``[B, ..., S, E]``.
        value: ``[B, ..., S, EV]``.
        attn_mask: floats that are added to the scores, or booleans that are true for the positions
            to attend to; broadcast to ``[B, ..., L, S]``.
    """
    if attn_mask is not None and query.shape[-2] >= _MANY_QUERIES:
        stop = _used(query, key, attn_mask)
        key, value = key[..., :stop, :], value[..., :stop, :]
        attn_mask = attn_mask[..., :stop] if attn_mask.shape[-1] > 1 else attn_mask
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def _used(query: Tensor, key: Tensor, mask: Tensor) -> int:
    """The end of the positions that some query attends to, so that a cache's empty end is skipped.

    A position is left out only when its weight is exactly 0 for every query. That is so when its
    score, bounded by the product of the longest query and the longest key, is so far below the
    row's largest score that the exponential of the difference is 0 in float32.
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
