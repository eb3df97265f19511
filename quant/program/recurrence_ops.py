"""The ``edgeforge::`` operators of recurrent layers: a memory of products, and a token's shift.

One operator is the recurrence of RWKV 5 and 6, of Mamba 2 and of the gated delta rule; they differ
in which operands they have. As in `quant.program.ops`, the plain torch implementation of each
DEFINES it. `quant.program.states` says what the states mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("edgeforge::recurrence", mutates_args=("memory",))
def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    position: Tensor,
) -> Tensor:
    """Reads and updates a memory of outer products, token after token, in float32.

    Each head has a memory ``S``, float32[n, p]. For each token in turn, with ``q``, ``k``, ``v``
    those of the head::

        if bonus is given:  out = q @ S + (q * bonus) @ k * v       # reads before it updates
        S = exp(log_decay)[:, None] * S
        if beta is given:   v = beta * (v - k @ S)                  # the delta rule
        S = S + outer(k, v)
        otherwise:          out = q @ S

    With ``bonus`` it is RWKV 5 and 6 (arXiv 2404.05892). Without, it is Mamba 2 (arXiv 2405.21060),
    and with ``beta`` the gated delta rule (arXiv 2412.06464). A call at position 0 begins a text
    and ignores what ``memory`` holds. A text in one call or in several gives the same result.

    Args:
        query: ``float[b, t, g, n]``; also called receptance (RWKV) and C (Mamba).
        key: ``float[b, t, g, n]``; also called B. A head of these serves ``h / g`` heads that
            follow each other.
        value: ``float[b, t, h, p]``.
        log_decay: the logarithm of what is kept, at most 0: ``float[b, t, h]`` for each head,
            ``float[b, t, h, n]`` for each row of the memory, or a weight ``float[h, n]`` that is
            the same for all tokens.
        bonus: ``float[h, n]``, what a token's own key counts for its own result; None for none.
        beta: ``float[b, t, h]``, how far a value replaces what the key finds; None to add values.
        memory: ``float[b, h, n, p]``, replaced by the memory after the last token.
        position: ``int64[1]``, the number of tokens before these.

    Returns:
        ``float[b, t, h, p]``.
    """
    heads, count = value.shape[2], value.shape[1]
    each = heads // query.shape[2]
    q, k = (x.float().repeat_interleave(each, 2) for x in (query, key))
    v = value.float()
    kept = log_decay.float().exp()
    kept = kept[:, :, :, None] if kept.dim() == 3 else kept
    kept = kept.expand(*v.shape[:3], kept.shape[-1])
    held = memory.float() if int(position) else torch.zeros_like(memory, dtype=torch.float32)
    out = torch.empty_like(v)
    for t in range(count):
        now, row = k[:, t, :, :, None], v[:, t]
        if bonus is not None:
            own = (q[:, t] * bonus.float() * k[:, t]).sum(-1, keepdim=True)
            out[:, t] = (q[:, t, :, None] @ held)[..., 0, :] + own * row
        held = kept[:, t, :, :, None] * held
        if beta is not None:
            row = beta[:, t, :, None].float() * (row - (k[:, t, :, None] @ held)[..., 0, :])
        held = held + now * row[..., None, :]
        if bonus is None:
            out[:, t] = (q[:, t, :, None] @ held)[..., 0, :]
    memory.copy_(held)
    return out.to(value.dtype)


@recurrence.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    position: Tensor,
) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("edgeforge::token_shift", mutates_args=("recent",))
def token_shift(x: Tensor, recent: Tensor, position: Tensor) -> Tensor:
    """Each token's predecessor: ``y[t] = x[t - 1]``, as in RWKV.

    The first token of a text has zeros. A call at position 0 begins a text and ignores what
    ``recent`` holds.

    Args:
        x: ``float[b, t, n]``.
        recent: ``float[b, n, 1]``, the token before these; replaced by the last of these.
        position: ``int64[1]``, the number of tokens before these.

    Returns:
        ``float[b, t, n]``.
    """
    before = recent if int(position) else torch.zeros_like(recent)
    row = torch.cat((before.to(x.dtype).transpose(1, 2), x), 1)
    recent.copy_(row[:, -1:].transpose(1, 2))
    return row[:, :-1].contiguous()


@token_shift.register_fake
def _(x: Tensor, recent: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(x)
