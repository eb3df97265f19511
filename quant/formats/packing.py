"""Packs and unpacks codes, and computes the values that they stand for.

Codes lie along the last dimension in a stream of bits that begins with the lowest bit of each byte.
A byte therefore holds two int4 codes, and its LOW nibble holds the even column: this is the layout
of ONNX Runtime's MatMulNBits and of XNNPACK. A byte holds four int2 codes, the first in the lowest
bits, as in MatMulNBits too, or one int8 code.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from quant.formats.formats import IntFormat, PaletteFormat


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes two per byte along the last dimension.

    Args:
        codes: uint8 ``[..., n]`` of values 0 to 15. An odd ``n`` leaves the last high nibble zero.

    Returns:
        uint8 ``[..., ceil(n / 2)]``.

    >>> pack_int4(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist()
    [33, 3]
    """
    even = codes[..., 0::2]
    packed = even.clone(memory_format=torch.contiguous_format)
    odd = codes[..., 1::2]
    packed[..., : odd.shape[-1]] |= odd << 4
    return packed


def unpack_int4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Undoes ``pack_int4``.

    Args:
        packed: uint8 ``[..., ceil(columns / 2)]``.
        columns: Codes to take from the last dimension.

    Returns:
        uint8 ``[..., columns]`` of values 0 to 15.

    >>> unpack_int4(torch.tensor([33, 3], dtype=torch.uint8), 3).tolist()
    [1, 2, 3]
    """
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :columns]


def pack_int4_numpy(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """``pack_int4`` for numpy arrays.

    >>> pack_int4_numpy(np.array([1, 2, 3], dtype=np.uint8)).tolist()
    [33, 3]
    """
    packed = codes[..., 0::2].copy()
    odd = codes[..., 1::2]
    packed[..., : odd.shape[-1]] |= odd << np.uint8(4)
    return packed


def unpack_int4_numpy(packed: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """``unpack_int4`` for numpy arrays.

    >>> unpack_int4_numpy(np.array([33, 3], dtype=np.uint8), 3).tolist()
    [1, 2, 3]
    """
    pairs = np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :columns]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes into a stream of bits along the last dimension, the lowest bit first.

    Args:
        codes: uint8 ``[..., n]`` of values below ``2 ** bits``, where ``n * bits`` is a multiple
            of 8.
        bits: 1 to 8.

    Returns:
        uint8 ``[..., n * bits / 8]``.

    >>> pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3).tolist()
    [209, 88, 31]
    """
    if bits == 8:
        return codes
    if bits == 4:
        return pack_int4(codes)
    per_word = 8 // math.gcd(bits, 8)
    words = codes.reshape(*codes.shape[:-1], -1, per_word)
    packed = words.new_zeros(*words.shape[:-1], per_word * bits // 8)
    for index in range(per_word):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= words[..., index] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= words[..., index] >> (8 - shift)
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Undoes ``pack_bits``.

    Args:
        packed: uint8 ``[..., n * bits / 8]``.
        bits: 1 to 8.

    Returns:
        uint8 ``[..., n]`` of values below ``2 ** bits``.

    >>> unpack_bits(torch.tensor([209, 88, 31], dtype=torch.uint8), 3).tolist()
    [1, 2, 3, 4, 5, 6, 7, 0]
    """
    if bits == 8:
        return packed
    if bits == 4:
        return unpack_int4(packed, packed.shape[-1] * 2)
    per_word = 8 // math.gcd(bits, 8)
    words = packed.reshape(*packed.shape[:-1], -1, per_word * bits // 8)
    codes = words.new_empty(*words.shape[:-1], per_word)
    for index in range(per_word):
        byte, shift = divmod(index * bits, 8)
        code = words[..., byte] >> shift
        if shift + bits > 8:
            code = code | words[..., byte + 1] << (8 - shift)
        codes[..., index] = code & ((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def pack_codes(codes: torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    """Packs codes or zero points as a format stores them; zeros fill up the last byte.

    Args:
        codes: uint8 ``[..., n]`` of values below ``2 ** bits``.
        fmt: The format that they are stored in.

    Returns:
        uint8 ``[..., ceil(n * bits / 8)]``, contiguous.

    >>> pack_codes(torch.tensor([3, 2, 1, 0, 3], dtype=torch.uint8), IntFormat(2, 4)).tolist()
    [27, 3]
    """
    count, per_word = codes.shape[-1], 8 // math.gcd(fmt.bits, 8)
    packed = pack_bits(_filled(codes, per_word), fmt.bits)
    return packed[..., : -(-count * fmt.bits // 8)].contiguous()


def unpack_codes(codes: torch.Tensor, fmt: IntFormat, count: int) -> torch.Tensor:
    """Undoes ``pack_codes``: one code per element.

    Args:
        codes: Packed codes or zero points of ``fmt``: uint8 ``[..., ceil(count * bits / 8)]``.
        fmt: The format that they are stored in.
        count: Codes in the last dimension.

    Returns:
        uint8 ``[..., count]``.
    """
    per_word = fmt.bits // math.gcd(fmt.bits, 8)
    return unpack_bits(_filled(codes, per_word), fmt.bits)[..., :count]


def _filled(values: torch.Tensor, unit: int) -> torch.Tensor:
    """Pads with zeros to a multiple of ``unit``; a matrix's codes need none and are not copied."""
    missing = -values.shape[-1] % unit
    return F.pad(values, (0, missing)) if missing else values


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: IntFormat
) -> torch.Tensor:
    """Returns the values that the stored parts stand for: it defines every integer format.

    Args:
        codes: uint8 ``[rows, cols * bits / 8]``.
        scale: bfloat16 or float16 ``[rows, groups]``.
        zero_point: uint8 ``[rows, ceil(groups * bits / 8)]``, or None when ``fmt`` is symmetric.
        fmt: The format of the parts.

    Returns:
        float32 ``[rows, cols]``, exact: the product of an integer of at most 9 bits and a bfloat16
        or float16 number fits float32.

    >>> codes = torch.tensor([[0x98, 0x07]], dtype=torch.uint8)
    >>> scale = torch.tensor([[0.5]], dtype=torch.bfloat16)
    >>> dequantize(codes, scale, None, IntFormat(4, 4)).tolist()
    [[0.0, 0.5, -0.5, -4.0]]
    """
    rows, stored = codes.shape
    cols = stored * 8 // fmt.bits
    groups = scale.shape[1]
    grouped = unpack_codes(codes, fmt, cols).reshape(rows, groups, cols // groups)
    if zero_point is None:
        centred = grouped.to(torch.float32) - fmt.implicit_zero_point
    else:
        zero = unpack_codes(zero_point, fmt, groups).reshape(rows, groups, 1)
        centred = grouped.to(torch.float32) - zero.to(torch.float32)
    return (centred * scale.to(torch.float32).unsqueeze(-1)).reshape(rows, cols)


def look_up(
    codes: torch.Tensor, lut: torch.Tensor, fmt: PaletteFormat, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the values that the stored parts stand for: it defines every palette format.

    Args:
        codes: uint8 ``[rows, cols * bits / 8]``.
        lut: float16 ``[groups, 2 ** bits]``.
        fmt: The format of the parts.
        rows: int64 ``[rows]``, the indices of these rows in the whole matrix; None when ``codes``
            holds all of its rows.

    Returns:
        float32 ``[rows, cols]``, exactly the tables' entries.

    >>> codes = torch.tensor([[0b11100100], [0b00000001]], dtype=torch.uint8)
    >>> lut = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [3.0, 4.0, 5.0, 6.0]], dtype=torch.float16)
    >>> look_up(codes, lut, PaletteFormat(2, 1)).tolist()
    [[-1.0, 0.0, 0.5, 2.0], [4.0, 3.0, 3.0, 3.0]]
    """
    if rows is None:
        rows = torch.arange(len(codes))
    index = unpack_bits(codes, fmt.bits).to(torch.int64)
    if fmt.rows_per_group is not None:
        index += (rows // fmt.rows_per_group * fmt.entries).unsqueeze(1)
    return torch.take(lut.to(torch.float32), index)
