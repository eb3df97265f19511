"""Two ways to compute RMSNorm on values whose squares overflow float16."""

from __future__ import annotations

import math

from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Value


def wide_rms_norm(emitter: Emitter, name: str, x: Value, weight: Value, epsilon: float) -> Value:
    """``x / sqrt(mean(x**2) + epsilon) * weight``, computed in float32.

    Args:
        emitter: the function to add to.
        name: the result's name.
        x: ``fp16[..., n]``.
        weight: the norm's weight, ``[n]``.
        epsilon: the number that is added to the mean.

    Returns:
        ``fp16[..., n]``.
    """
    wide = emitter.cast(f"{name}_wide", x, "fp32")
    mean = emitter.reduce(
        "reduce_mean", f"{name}_mean", emitter.binary("mul", f"{name}_square", wide, wide)
    )
    scaled = emitter.binary(
        "mul", f"{name}_scaled", wide, emitter.rsqrt(f"{name}_rsqrt", mean, epsilon)
    )
    scale = emitter.cast_once(f"{weight.name}_wide", weight, "fp32")
    return emitter.cast(name, emitter.binary("mul", f"{name}_weighted", scaled, scale), "fp16")


def scaled_rms_norm(emitter: Emitter, name: str, x: Value, weight: Value, epsilon: float) -> Value:
    """RMSNorm in float16 arithmetic: each vector is first divided by its largest magnitude m.

    ``x / sqrt(mean(x**2) + epsilon)`` equals ``y / sqrt(mean(y**2) + epsilon / m**2)`` for
    y = x / m. The identity holds for any m, so m is not taken smaller than about
    ``sqrt(epsilon)``: below it, ``epsilon / m**2`` would overflow float16. The arguments and the
    result are those of `wide_rms_norm`.
    """
    floor = 2.0 ** round(math.log2(math.sqrt(epsilon)))
    largest = emitter.reduce("reduce_max", f"{name}_most", emitter.unary("abs", f"{name}_abs", x))
    divisor = emitter.binary("maximum", f"{name}_divisor", largest, floor)
    y = emitter.binary("real_div", f"{name}_unit", x, divisor)
    mean = emitter.reduce(
        "reduce_mean", f"{name}_mean", emitter.binary("mul", f"{name}_square", y, y)
    )
    root = emitter.binary(
        "real_div",
        f"{name}_root",
        emitter.constant(math.sqrt(epsilon), x.dtype),
        divisor,
    )
    small = emitter.binary("mul", f"{name}_epsilon", root, root)
    total = emitter.binary("add", f"{name}_total", mean, small)
    scaled = emitter.binary("mul", f"{name}_scaled", y, emitter.rsqrt(f"{name}_rsqrt", total, 0.0))
    scale = emitter.cast_once(f"{weight.name}_half", weight, "fp16")
    return emitter.binary("mul", name, scaled, scale)
