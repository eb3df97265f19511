"""The ``edgeforge::`` operators that carry a state from call to call: attention, convolution.

A state is an argument that the operator changes. `quant.program.states` says what kinds there are,
and what a call's position means to each. Shapes use the letters of `quant.program.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("edgeforge::attention", mutates_args=("k_cache", "v_cache"))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Extends the key and value caches in place, then computes causal attention over them.

    Args:
        q: ``float[b, t, h, d]``; h is a multiple of k (grouped queries, Ainslie et al. 2023).
        k: ``float[b, t, k, d]``, written to ``k_cache[:, :, position : position + t]``.
        v: ``float[b, t, k, d]``, written to the same places of ``v_cache``.
        k_cache: ``float[b, k, c, d]``.
        v_cache: ``float[b, k, c, d]``.
        position: ``int64[1]``, the number of tokens already cached.
        window: token i sees tokens j with ``i - window < j <= i``; 0 for all ``j <= i``.
        scale: factor on ``q @ k.T``.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)`` before the softmax, as in
            Gemma 2 (arXiv 2408.00118); 0 leaves them as they are.

    Returns:
        ``float[b, t, h * d]``.
    """
    start, t = int(position), q.shape[1]
    end = start + t
    if end > k_cache.shape[2]:
        raise ValueError(f"position {end} lies past the context of {k_cache.shape[2]} tokens")
    k_cache[:, :, start:end] = k.transpose(1, 2)
    v_cache[:, :, start:end] = v.transpose(1, 2)
    first = max(0, start - window + 1) if window else 0
    query = torch.arange(start, end, device=q.device)[:, None]
    key = torch.arange(first, end, device=q.device)[None, :]
    seen = key <= query
    if window:
        seen &= key > query - window
    queries, keys, values = q.transpose(1, 2), k_cache[:, :, first:end], v_cache[:, :, first:end]
    if softcap:
        groups = q.shape[2] // k.shape[2]
        scores = queries @ keys.repeat_interleave(groups, 1).transpose(2, 3) * scale
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~seen, -torch.inf)
        out = scores.softmax(-1) @ values.repeat_interleave(groups, 1)
    else:
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=seen,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2).reshape(q.shape[0], t, -1)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


@torch.library.custom_op("edgeforge::short_conv", mutates_args=("recent",))
def short_conv(x: Tensor, weight: Tensor, recent: Tensor, position: Tensor) -> Tensor:
    """A causal convolution of each column over the last few tokens, as in LFM2.

    ``y[t] = sum over j of weight[:, j] * x[t - (w - 1) + j]``; tokens before the text's first are
    zeros. A call at position 0 begins a text and ignores what ``recent`` holds.

    Args:
        x: ``float[b, t, n]``.
        weight: ``float[n, w]``; the last column multiplies the token itself.
        recent: ``float[b, n, w - 1]``, the tokens before these; replaced by the last ``w - 1``.
        position: ``int64[1]``, the number of tokens before these.

    Returns:
        ``float[b, t, n]``.
    """
    width, count = weight.shape[1], x.shape[1]
    before = recent if int(position) else torch.zeros_like(recent)
    row = torch.cat((before.to(x.dtype), x.transpose(1, 2)), 2)
    recent.copy_(row[..., count:])
    terms = [weight[:, j, None].to(x.dtype) * row[..., j : j + count] for j in range(width)]
    return torch.stack(terms).sum(0).transpose(1, 2).contiguous()


@short_conv.register_fake
def _(x: Tensor, weight: Tensor, recent: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(x)
