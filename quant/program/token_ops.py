"""The ``edgeforge::`` operators, besides products and RMSNorm, that work token by token.

As in `quant.program.ops`, the plain torch implementation of each DEFINES it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("edgeforge::bias", mutates_args=())
def bias(x: Tensor, weight: Tensor) -> Tensor:
    """``x + weight``: ``float[..., n], float[n] -> float[..., n]``.

    It follows a `linear`, or the `combine` of a mixture's experts.
    """
    return x + weight.to(x.dtype)


@bias.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last axis (Ba et al. 2016).

    Computed in float32 whatever the dtype of ``x``; the variance is the biased one.

    Args:
        x: ``float[..., n]``.
        weight: ``float[n]``; None for a norm without a scale.
        bias: ``float[n]``; None for a norm without one.
        eps: added to the variance.

    Returns:
        ``float[..., n]``.
    """
    scale = None if weight is None else weight.float()
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], scale, shift, eps).to(x.dtype)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::gelu", mutates_args=())
def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU (Hendrycks & Gimpel 2016), element by element: ``float[...] -> float[...]``.

    Args:
        x: ``float[...]``.
        approximate: ``none`` for ``x * P(X <= x)``, ``tanh`` for the form with a tanh, which
            checkpoints call ``gelu_new`` and ``gelu_pytorch_tanh``.
    """
    return F.gelu(x, approximate=approximate)


@gelu.register_fake
def _(x: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::scale", mutates_args=())
def scale(x: Tensor, factor: float) -> Tensor:
    """``x * factor``, element by element: ``float[...] -> float[...]``."""
    return x * factor


@scale.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::softcap", mutates_args=())
def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, element by element, as on Gemma 2's logits (arXiv 2408.00118)."""
    return torch.tanh(x / cap) * cap


@softcap.register_fake
def _(x: Tensor, cap: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::clamp", mutates_args=())
def clamp(x: Tensor, limit: float) -> Tensor:
    """``x`` kept within ``-limit`` and ``limit``, as OLMo's ``clip_qkv`` does."""
    return x.clamp(-limit, limit)


@clamp.register_fake
def _(x: Tensor, limit: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::gain", mutates_args=())
def gain(x: Tensor, weight: Tensor) -> Tensor:
    """``x * weight``, element by element.

    Args:
        x: ``float[..., n]``, or ``float[..., h, n]``.
        weight: ``float[n]``, a factor of each column; or ``float[h, 1]``, one of each head.

    Returns:
        ``float[...]``, as ``x``.
    """
    return x * weight.to(x.dtype)


@gain.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::l2_norm", mutates_args=())
def l2_norm(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(sum(x**2, -1) + eps)`` over the last axis, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


@l2_norm.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)
