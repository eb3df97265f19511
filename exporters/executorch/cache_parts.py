"""Emits the parts of which queries, keys and values consist: float32, or int8 with its grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from exporters.executorch.method import SCALAR_TYPES, ScalarType
from exporters.executorch.state import CacheDtype, MethodLowering


@dataclass(frozen=True)
class Part:
    """One tensor of those that queries, keys or values consist of: ``dtype[1, t, heads, width]``.

    Attributes:
        value: the number of the method's value.
        dtype: the element type.
        width: the last dimension.
    """

    value: int
    dtype: ScalarType
    width: int


def _floats(state: MethodLowering, value: int, dims: list[int]) -> list[Part]:
    """Queries, keys or values as one float32 tensor."""
    return [Part(value, "float32", dims[1])]


def _integers(state: MethodLowering, value: int, dims: list[int]) -> list[Part]:
    """Emits the rounding to int8, with one zero point and one scale for each token and head.

    The parts come in the order in which the attention kernel takes them.

    Given: ``x: float32[1, t, heads, width]``
    Result: ``int8[1, t, heads, width]``, ``int8[1, t, heads, 1]``, ``float32[1, t, heads, 1]``
    """
    method, (heads, width) = state.method, dims

    def made(dtype: ScalarType, width: int) -> int:
        return method.tensor(dtype, [1, state.limit, heads, width], dynamic=True)

    int8 = method.integer(SCALAR_TYPES["int8"][0])
    scale, zero_point = made("float64", 1), made("int64", 1)  # the kernel takes no other dtypes
    method.call(
        "quantized_decomposed::choose_qparams_per_token_asymmetric",
        "out",
        value,
        int8,
        scale,
        zero_point,
        method.tensors([scale, zero_point]),
    )
    codes = made("int8", width)
    method.call(
        "quantized_decomposed::quantize_per_token",
        "out",
        value,
        scale,
        zero_point,
        method.integer(-128),
        method.integer(127),
        int8,
        out=codes,
    )
    parts = [Part(codes, "int8", width)]
    narrowed: tuple[tuple[int, ScalarType], ...] = ((zero_point, "int8"), (scale, "float32"))
    for wide, dtype in narrowed:
        narrow = made(dtype, 1)
        method.call("aten::_to_copy", "out", wide, method.boolean(False), method.none(), out=narrow)
        parts.append(Part(narrow, dtype, 1))
    return parts


PARTS: Final[dict[CacheDtype, Callable[[MethodLowering, int, list[int]], list[Part]]]] = {
    "float32": _floats,
    "int8": _integers,
}


def floats_of(state: MethodLowering, parts: list[int], dims: list[int], length: int) -> int:
    """Emits the numbers that int8 codes stand for; float32 parts are these themselves.

    Args:
        state: the method.
        parts: the method's values of the parts, in the order of `PARTS`.
        dims: heads and width.
        length: the largest number of tokens.
    """
    if len(parts) == 1:
        return parts[0]
    method, (codes, zero_point, scale) = state.method, parts
    heads, width = dims
    wide = method.tensor("int64", [1, length, heads, 1], dynamic=True)  # as the kernel takes it
    method.call("aten::_to_copy", "out", zero_point, method.boolean(False), method.none(), out=wide)
    out = method.tensor("float32", [1, length, heads, width], dynamic=True)
    int8, float32 = (method.integer(SCALAR_TYPES[name][0]) for name in ("int8", "float32"))
    method.call(
        "quantized_decomposed::dequantize_per_token",
        "out",
        codes,
        scale,
        wide,
        method.integer(-128),
        method.integer(127),
        int8,
        float32,
        out=out,
    )
    return out
