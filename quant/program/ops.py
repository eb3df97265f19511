"""The ``edgeforge::`` operators, in which every traced program is written.

Each operator has a plain torch implementation, which DEFINES it (references and tests run it), and
a fake kernel, which computes only shapes, so that a model of any size traces on the meta device.
Exporters translate these operators and a few ATen operators; `quant.program.dialect` lists both.
This file has the products, RMSNorm and the rotary embedding; `quant.program.token_ops` has what
else works token by token, and `quant.program.state_ops` what carries a state from call to call.

Shapes use: ``b`` batch, ``t`` new tokens, ``c`` cache length (the declared context), ``h`` query
heads, ``k`` key/value heads, ``d`` head width, ``r`` rotary width, ``v`` vocabulary.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.formats.formats import FloatFormat, PaletteFormat, QuantizedFormat, parse_format
from quant.formats.packing import dequantize, look_up

# The step of a token of zeros: any positive one gives zeros back, and 0 would be a divisor.
SMALLEST_STEP: Final = 1e-30


def quantized_format(format: str) -> QuantizedFormat:
    """Returns the integer or palette format that an operator's ``format`` argument names.

    Raises:
        ValueError: the name is a float format's.
    """
    parsed = parse_format(format)
    if isinstance(parsed, FloatFormat):
        raise ValueError(
            f"{format} is a float format; quantized operators take integer and palette formats: "
            f"use edgeforge::linear or edgeforge::embedding"
        )
    return parsed


@torch.library.custom_op("edgeforge::embedding", mutates_args=())
def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table: ``int64[b, t], float[v, n] -> float[b, t, n]``."""
    return F.embedding(tokens, weight)


@embedding.register_fake
def _(tokens: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[1]))


@torch.library.custom_op("edgeforge::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: ``float[..., i], float[o, i] -> float[..., o]``."""
    return F.linear(x, weight)


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("edgeforge::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2, -1) + eps) * weight`` over the last axis (Zhang & Sennrich 2019).

    Computed in float32 whatever the dtype of ``x``; ``float[..., n], float[n] -> float[..., n]``.
    """
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """Rotary position embedding in the rotate-half form (Su et al. 2021), read from tables.

    Args:
        x: ``float[b, t, h, d]``.
        cos: ``float32[c, r // 2]``, row p for position p; the first ``r`` of ``d`` are rotated.
        sin: ``float32[c, r // 2]``.
        position: ``int64[1]``, the position of the first of the ``t`` tokens.

    Returns:
        ``float[b, t, h, d]``.
    """
    start = int(position)
    rows = slice(start, start + x.shape[1])
    if rows.stop > len(cos):
        raise ValueError(f"position {rows.stop} lies past the tables' {len(cos)} rows")
    c, s = cos[rows, None, :], sin[rows, None, :]
    half = cos.shape[1]
    wide = x.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat((first * c - second * s, second * c + first * s, rest), -1).to(x.dtype)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: str
) -> Tensor:
    """`linear` with a weight in an integer or a palette format.

    Args:
        x: ``float[..., i]``.
        codes: ``uint8[o, i * bits / 8]``, packed as the format's ``layout`` method in
            `quant.formats.formats` describes.
        scale: ``bfloat16[o, groups]``; for a palette format its tables,
            ``float16[groups, 2 ** bits]``.
        zero_point: ``uint8[o, ceil(groups * bits / 8)]``; None when the format is symmetric or a
            palette.
        format: a name that `quant.formats.formats.parse_format` reads, such as ``int4-g32`` or
            ``lut4-gc16``.

    Returns:
        ``float[..., o]``.
    """
    fmt = quantized_format(format)
    if isinstance(fmt, PaletteFormat):
        weight = look_up(codes, scale, fmt)
    else:
        weight = dequantize(codes, scale, zero_point, fmt)
    return F.linear(x, weight.to(x.dtype))


@quant_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("edgeforge::quant_embedding", mutates_args=())
def quant_embedding(
    tokens: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: str
) -> Tensor:
    """`embedding` with a table in an integer or a palette format; arguments as `quant_linear`."""
    rows, where = torch.unique(tokens, return_inverse=True)
    fmt = quantized_format(format)
    if isinstance(fmt, PaletteFormat):
        return look_up(codes[rows], scale, fmt, rows)[where]
    zero = None if zero_point is None else zero_point[rows]
    return dequantize(codes[rows], scale[rows], zero, fmt)[where]


@quant_embedding.register_fake
def _(
    tokens: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: str
) -> Tensor:
    columns = codes.shape[1] * 8 // quantized_format(format).bits
    return torch.empty((*tokens.shape, columns), dtype=torch.float32, device=codes.device)


@torch.library.custom_op("edgeforge::round_per_token", mutates_args=())
def round_per_token(x: Tensor) -> Tensor:
    """Rounds each token's activations to 256 levels that span its own range and include zero.

    A token's step is one 255th of the distance from its lowest to its highest number, zero
    included; its zero point, from -128 to 127, is the code of zero. ExecuTorch quantizes
    activations for XNNPACK in this way (``choose_qparams_per_token_asymmetric``).

    Args:
        x: ``float[..., n]``; the last axis holds one token's activations.

    Returns:
        ``float[..., n]``: ``(code - zero_point) * step``.
    """
    wide = x.float()
    low = wide.amin(-1, keepdim=True).clamp_max(0.0)
    high = wide.amax(-1, keepdim=True).clamp_min(0.0)
    step = ((high - low) / 255).clamp_min(SMALLEST_STEP)
    zero = (-low / step).round_().sub_(128)
    codes = (wide / step).round_().add_(zero).clamp_(-128, 127)
    return codes.sub_(zero).mul_(step).to(x.dtype)


@round_per_token.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::round_per_tensor", mutates_args=())
def round_per_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """Rounds all activations by one scale: ``clip(round(x / scale), -128, 127) * scale``.

    Args:
        x: ``float[..., n]``.
        scale: ``bfloat16[1, 1]``, the scale of all activations, found on a calibration text.

    Returns:
        ``float[..., n]``.
    """
    step = scale.float().reshape(())
    return (x.float() / step).round_().clamp_(-128, 127).mul_(step).to(x.dtype)


@round_per_tensor.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)
