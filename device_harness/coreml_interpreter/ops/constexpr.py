"""Operations that make weights from compressed constants; a weight is unpacked on use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Ints, Making, Operation, Part
from device_harness.coreml_interpreter.values import (
    STORAGE,
    constant_tensor,
    round_to_half,
    storage,
)
from device_harness.coreml_interpreter.weights import (
    BlockWeight,
    DerivedWeight,
    LookupWeight,
    Weight,
    look_up,
    shift_scale,
)
from device_harness.errors import DeviceError
from exporters.coreml.constants import Constant


def constexpr_blockwise_shift_scale(
    making: Making, data: Part, scale: Part, offset: Part | None = None
) -> Weight:
    """``scale * (data - offset)``, with one scale and one offset for each block (iOS 18)."""
    scales, offsets = _floats(scale), None if offset is None else _floats(offset)
    shape = _shape(data)
    if len(shape) != scales.dim() or any(
        blocks < 1 or dim % blocks for dim, blocks in zip(shape, scales.shape, strict=False)
    ):
        raise DeviceError(
            f"scales of shape {list(scales.shape)} do not divide data of shape {list(shape)} into "
            f"blocks"
        )
    if offsets is not None and offsets.shape != scales.shape:
        raise DeviceError(
            f"offsets have shape {list(offsets.shape)}, but scales have shape {list(scales.shape)}"
        )
    if isinstance(data, Constant):
        return BlockWeight(data, scales, offsets, making.half, making.budget)
    return _derived(making, shape, lambda: shift_scale(_floats(data), scales, offsets))


def constexpr_affine_dequantize(
    making: Making, quantized_data: Part, zero_point: Part, scale: Part, axis: int
) -> Weight:
    """``scale * (quantized_data - zero_point)`` (iOS 16).

    There is one scale and one zero point for all data, or one for each slice of ``axis``.
    """
    shape = _shape(quantized_data)
    scales, points = _floats(scale), _floats(zero_point)
    count = max(scales.numel(), points.numel())
    if count not in (1, shape[axis]):
        raise DeviceError(f"there are {count} scales for {shape[axis]} slices")
    form = [1] * len(shape)
    form[axis] = count
    scales = scales.reshape(-1).expand(count).reshape(form)
    points = points.reshape(-1).expand(count).reshape(form)
    if isinstance(quantized_data, Constant):
        return BlockWeight(quantized_data, scales, points, making.half, making.budget)
    return _derived(making, shape, lambda: shift_scale(_floats(quantized_data), scales, points))


def constexpr_lut_to_dense(
    making: Making,
    indices: Part,
    lut: Part,
    shape: Ints | None = None,
    vector_axis: int | None = None,
) -> Weight:
    """Entries of tables (iOS 16: one table and packed indices; iOS 18: one table a block)."""
    if shape is not None:
        return _lut_of_ios16(making, indices, lut, shape)
    tables = _whole(lut)
    form = _shape(indices)
    _check_tables(form, tables)
    if tables.shape[-1] > 1:
        if vector_axis is None:
            raise DeviceError("entries of more than one element need a vector_axis")
        axis = vector_axis % len(form)
        wide = [dim * tables.shape[-1] if at == axis else dim for at, dim in enumerate(form)]
        return _derived(making, tuple(wide), lambda: look_up(_whole(indices), tables, axis))
    if isinstance(indices, Constant):
        return LookupWeight(indices, tables, making.half, making.budget)
    return _derived(making, form, lambda: look_up(_whole(indices), tables, 0))


def constexpr_sparse_to_dense(
    making: Making, nonzero_data: Part, mask: Part, shape: Ints | None = None
) -> Weight:
    """Values where a mask is set, zeros elsewhere (iOS 16: a packed mask; iOS 18: a uint1 mask)."""
    if shape is not None:
        mask = _packed(mask, 1, shape)
    places = mask
    return _derived(making, _shape(places), lambda: _dense(_whole(nonzero_data), places))


def constexpr_lut_to_sparse(
    making: Making,
    indices_mask: Part,
    indices_nonzero_data: Part,
    lut: Part,
    vector_axis: int | None = None,
) -> tuple[Part, Weight]:
    """Table entries for the indices where a mask is set; returns a mask and values (iOS 18)."""
    tables = _whole(lut)
    form, width = _shape(indices_mask), tables.shape[-1]
    _check_tables(form, tables)
    axis = 0 if vector_axis is None else vector_axis % len(form)

    def wide_mask() -> Tensor:
        return _whole(indices_mask).repeat_interleave(width, axis)

    def values() -> Tensor:
        codes = _dense(_whole(indices_nonzero_data), indices_mask)
        return look_up(codes, tables, axis)[wide_mask() != 0]

    count = math.prod(_shape(indices_nonzero_data)) * width
    wide = tuple(dim * width if at == axis else dim for at, dim in enumerate(form))
    mask = indices_mask if width == 1 else DerivedWeight(wide, making.budget, wide_mask)
    return mask, _derived(making, (count,), values)


def constexpr_sparse_blockwise_shift_scale(
    making: Making, data_mask: Part, nonzero_data: Part, scale: Part, offset: Part | None = None
) -> tuple[Part, Weight]:
    """Scaled integers where a mask is set; returns the mask and the values (iOS 18)."""
    scales, offsets = _floats(scale), None if offset is None else _floats(offset)

    def values() -> Tensor:
        dense = _dense(_floats(nonzero_data), data_mask)
        return shift_scale(dense, scales, offsets)[_whole(data_mask) != 0]

    return data_mask, _derived(making, _shape(nonzero_data), values)


def constexpr_cast(making: Making, source_val: Part, output_dtype: str) -> Weight:
    """Casts to another float type."""
    storage(output_dtype, "the result")
    return _derived(making, _shape(source_val), lambda: _floats(source_val))


def _lut_of_ios16(making: Making, indices: Part, lut: Part, shape: Ints) -> Weight:
    tables = _whole(lut).reshape(-1)
    bits = tables.numel().bit_length() - 1
    if tables.numel() != 1 << bits or bits not in (1, 2, 3, 4, 6, 8):
        raise DeviceError(
            f"the table has {tables.numel()} entries; it must have 2, 4, 8, 16, 64 or 256"
        )
    codes = _packed(indices, bits, shape)
    form = [1] * len(shape)
    return LookupWeight(codes, tables.reshape(*form, -1, 1), making.half, making.budget)


def _packed(part: Part, bits: int, shape: Ints) -> Constant:
    """The unsigned integers that iOS 16's operations take as bytes."""
    if not isinstance(part, Constant) or part.dtype != "uint8" or len(shape) < 1:
        raise DeviceError("packed integers must be constants of type uint8")
    count = math.prod(shape)
    if min(shape) < 0 or part.elements != -(-count * bits // 8):
        raise DeviceError(f"{part.elements} bytes do not hold {count} integers of {bits} bits")
    data = part.data.reshape(-1)
    return Constant(f"uint{bits}", tuple(shape), data.reshape(shape) if bits == 8 else data)


def _check_tables(form: tuple[int, ...], tables: Tensor) -> None:
    groups = tables.shape[:-2]
    if tables.dim() != len(form) + 2 or any(
        count < 1 or dim % count for dim, count in zip(form, groups, strict=False)
    ):
        raise DeviceError(
            f"tables of shape {list(tables.shape)} do not divide indices of shape {list(form)}"
        )


def _dense(values: Tensor, mask: Part) -> Tensor:
    places = _whole(mask) != 0
    if int(places.sum()) != values.numel():
        raise DeviceError(
            f"a mask has {int(places.sum())} places for {values.numel()} values: the package was "
            f"changed"
        )
    dense = torch.zeros(places.shape, dtype=values.dtype)
    dense[places] = values
    return dense


def _derived(making: Making, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Weight:
    if not making.half:
        return DerivedWeight(shape, making.budget, compute)
    return DerivedWeight(shape, making.budget, lambda: round_to_half(compute()))


def _shape(part: Part) -> tuple[int, ...]:
    return tuple(part.shape)


def _whole(part: Part) -> Tensor:
    if isinstance(part, Constant):
        return constant_tensor(part)
    return part.tensor() if isinstance(part, Weight) else part


def _floats(part: Part) -> Tensor:
    return _whole(part).to(STORAGE["fp32"])


OPS: Final[dict[str, Operation]] = {
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_sparse_to_dense": constexpr_sparse_to_dense,
    "constexpr_lut_to_sparse": constexpr_lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": constexpr_sparse_blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
}
