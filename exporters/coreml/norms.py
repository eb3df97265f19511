"""RMSNorm and LayerNorm on values whose squares overflow float16: in float32, or by a divisor."""

from __future__ import annotations

import math

from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Value


def wide_rms_norm(emitter: Emitter, name: str, x: Value, weight: Value, epsilon: float) -> Value:
    """``x / sqrt(mean(x**2) + epsilon) * weight``, computed in float32.

    Args:
        emitter: the function to add to.
        name: the result's name.
        x: ``fp16[..., n]`` or ``fp32[..., n]``.
        weight: the norm's weight, ``[n]``.
        epsilon: the number that is added to the mean.

    Returns:
        ``fp32[..., n]``.
    """
    wide = emitter.cast(f"{name}_wide", x, "fp32")
    mean = emitter.reduce(
        "reduce_mean", f"{name}_mean", emitter.binary("mul", f"{name}_square", wide, wide)
    )
    scaled = emitter.binary(
        "mul", f"{name}_scaled", wide, emitter.rsqrt(f"{name}_rsqrt", mean, epsilon)
    )
    scale = emitter.cast_once(f"{weight.name}_wide", weight, "fp32")
    return emitter.binary("mul", f"{name}_weighted", scaled, scale)


def scaled_rms_norm(emitter: Emitter, name: str, x: Value, weight: Value, epsilon: float) -> Value:
    """RMSNorm in float16 arithmetic: each vector is first divided by its largest magnitude m.

    ``x / sqrt(mean(x**2) + epsilon)`` equals ``y / sqrt(mean(y**2) + epsilon / m**2)`` for
    y = x / m. The identity holds for any m, so m is not taken smaller than about
    ``sqrt(epsilon)``: below it, ``epsilon / m**2`` would overflow float16. The arguments are those
    of `wide_rms_norm`; the result is ``fp16[..., n]``.
    """
    y, divisor = _divided(emitter, name, x, math.sqrt(epsilon))
    scaled = _over_root(emitter, name, y, divisor, math.sqrt(epsilon))
    scale = emitter.cast_once(f"{weight.name}_half", weight, "fp16")
    return emitter.binary("mul", name, scaled, scale)


def wide_layer_norm(
    emitter: Emitter,
    name: str,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    epsilon: float,
) -> Value:
    """``(x - mean) / sqrt(variance + epsilon) * weight + bias``, computed in float32.

    Args:
        emitter: the function to add to.
        name: the result's name.
        x: ``fp16[..., n]`` or ``fp32[..., n]``.
        weight: the norm's scale, ``[n]``; None for none.
        bias: its shift, ``[n]``; None for none.
        epsilon: the number that is added to the variance.

    Returns:
        ``fp32[..., n]``.
    """
    wide = emitter.cast(f"{name}_wide", x, "fp32")
    centred = _centred(emitter, name, wide)
    variance = emitter.reduce(
        "reduce_mean", f"{name}_variance", emitter.binary("mul", f"{name}_square", centred, centred)
    )
    scaled = emitter.binary(
        "mul", f"{name}_scaled", centred, emitter.rsqrt(f"{name}_rsqrt", variance, epsilon)
    )
    return _weighted(emitter, name, scaled, weight, bias)


def scaled_layer_norm(
    emitter: Emitter,
    name: str,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    epsilon: float,
) -> Value:
    """LayerNorm in float16 arithmetic, safe as `scaled_rms_norm` is.

    The mean is subtracted from halves, because a difference may be twice as large as float16's
    largest number; what is left of it after rounding is subtracted once more from the quotients.
    ``(x - mean) / sqrt(variance + epsilon)`` equals ``z / sqrt(mean(z**2) + epsilon / (2 * m)**2)``
    for z = (x - mean) / (2 * m). The arguments are those of `wide_layer_norm`; the result is
    ``fp16[..., n]``.
    """
    root = math.sqrt(epsilon) / 2
    half = emitter.binary("mul", f"{name}_halves", x, 0.5)
    y, divisor = _divided(emitter, name, _centred(emitter, name, half), root)
    z = _centred(emitter, f"{name}_rest", y)
    scaled = _over_root(emitter, name, z, divisor, root)
    return _weighted(emitter, name, scaled, weight, bias)


def unit_norm(emitter: Emitter, name: str, x: Value, epsilon: float) -> Value:
    """``x / sqrt(sum(x**2) + epsilon)`` over the last axis: ``fp32[..., n] -> fp32[..., n]``."""
    square = emitter.binary("mul", f"{name}_square", x, x)
    total = emitter.reduce("reduce_sum", f"{name}_total", square)
    return emitter.binary("mul", f"{name}_unit", x, emitter.rsqrt(f"{name}_rsqrt", total, epsilon))


def _centred(emitter: Emitter, name: str, x: Value) -> Value:
    """``x`` minus its mean."""
    mean = emitter.reduce("reduce_mean", f"{name}_average", x)
    return emitter.binary("sub", f"{name}_centred", x, mean)


def _divided(emitter: Emitter, name: str, x: Value, least: float) -> tuple[Value, Value]:
    """``x / m`` and m: each vector's largest magnitude, but not less than about ``least``."""
    floor = 2.0 ** round(math.log2(least))
    largest = emitter.reduce("reduce_max", f"{name}_most", emitter.unary("abs", f"{name}_abs", x))
    divisor = emitter.binary("maximum", f"{name}_divisor", largest, floor)
    return emitter.binary("real_div", f"{name}_unit", x, divisor), divisor


def _over_root(emitter: Emitter, name: str, y: Value, divisor: Value, root: float) -> Value:
    """``y / sqrt(mean(y**2) + (root / divisor)**2)``."""
    mean = emitter.reduce(
        "reduce_mean", f"{name}_mean", emitter.binary("mul", f"{name}_square", y, y)
    )
    small = emitter.binary(
        "real_div", f"{name}_root", emitter.constant(root, divisor.dtype), divisor
    )
    added = emitter.binary("mul", f"{name}_epsilon", small, small)
    total = emitter.binary("add", f"{name}_total", mean, added)
    return emitter.binary("mul", f"{name}_scaled", y, emitter.rsqrt(f"{name}_rsqrt", total, 0.0))


def _weighted(
    emitter: Emitter, name: str, scaled: Value, weight: Value | None, bias: Value | None
) -> Value:
    """``scaled * weight + bias`` in the dtype of ``scaled``, without what is None."""
    suffix = "half" if scaled.dtype == "fp16" else "wide"
    if weight is not None:
        factors = emitter.cast_once(f"{weight.name}_{suffix}", weight, scaled.dtype)
        scaled = emitter.binary("mul", f"{name}_weighted", scaled, factors)
    if bias is not None:
        shifts = emitter.cast_once(f"{bias.name}_{suffix}", bias, scaled.dtype)
        scaled = emitter.binary("add", f"{name}_shifted", scaled, shifts)
    return scaled
