"""Operations that reshape, join, split, repeat, pad and make tensors."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_shape
from device_harness.coreml_interpreter.ops.kinds import Ints, Operation, Tensors
from device_harness.errors import DeviceError


def reshape(x: Tensor, shape: Ints) -> Tensor:
    """The same elements in another shape; 0 keeps ``x``'s dimension, -1 takes the rest.

    Zeros are matched from the last dimension on, as iOS 17 does. Where the shape has as many
    dimensions as ``x``, that equals the matching from the first dimension on before iOS 17.
    """
    dims = list(shape)
    for back in range(1, len(dims) + 1):
        if dims[-back] == 0 and x.numel():
            dims[-back] = x.shape[-back] if back <= x.dim() else 1
    return x.reshape(dims)


def reshape_like(
    x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors
) -> Tensor:
    """The same elements in a shape that joins parts of other tensors' shapes."""
    dims: list[int] = []
    for like, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True):
        dims += like.shape[int(begin) : None if bool(mask) else int(end)]
    return x.reshape(dims)


def transpose(x: Tensor, perm: Ints) -> Tensor:
    """The dimensions in the order ``perm``."""
    return x.permute(perm)


def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """Adds dimensions of size 1; ``axes`` are their positions in the result."""
    rank = x.dim() + len(axes)
    shape = list(x.shape)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return x.reshape(shape)


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Removes dimensions of size 1, all or those of ``axes``; other dimensions stay."""
    return x.squeeze() if axes is None else x.squeeze(axes)


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """Flattens to a matrix; the dimensions before ``axis`` become its rows."""
    return x.reshape(math.prod(x.shape[:axis]), -1)


def shape_of(x: Tensor) -> Tensor:
    """The shape of ``x`` as an int32 tensor."""
    return torch.tensor(x.shape, dtype=torch.int32)


def identity(x: Tensor) -> Tensor:
    """``x`` itself."""
    return x


def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Joins tensors along ``axis``; ``interleave`` takes one element of each in turn.

    Scalars join to a tensor of one dimension.
    """
    values = [value.reshape(1) if value.dim() == 0 else value for value in values]
    if interleave:
        return torch.stack(values, axis % values[0].dim() + 1).flatten(
            axis % values[0].dim(), axis % values[0].dim() + 1
        )
    return torch.cat(values, axis)


def stack(values: Tensors, axis: int) -> Tensor:
    """Joins tensors along a new dimension."""
    return torch.stack(values, axis)


def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> tuple[Tensor, ...]:
    """Splits along ``axis`` into parts of the given sizes, or into equal parts."""
    if split_sizes is not None:
        return torch.split(x, list(split_sizes), axis)
    if not num_splits or x.shape[axis] % num_splits:
        raise DeviceError(f"{x.shape[axis]} elements cannot be split into {num_splits} equal parts")
    return torch.split(x, x.shape[axis] // num_splits, axis)


def tile(x: Tensor, reps: Ints) -> Tensor:
    """Repeats ``x`` along each dimension as often as ``reps`` says."""
    check_shape(dim * times for dim, times in zip(x.shape, reps, strict=True))
    return x.repeat(reps)


def fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    """A tensor filled with one value, by default 0.0."""
    given = torch.zeros(()) if value is None else value.reshape(())
    return given.expand(check_shape(shape)).clone()


def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    """A tensor in another tensor's shape, filled with one value."""
    return fill(tuple(ref_tensor.shape), value)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """The numbers from ``start`` in steps of ``step``, without ``end``."""
    if float(step) == 0:
        raise DeviceError("a range with a step of 0 never ends")
    count = max(0, math.ceil((float(end) - float(start)) / float(step)))
    check_shape((count,))
    return start.reshape(()) + torch.arange(count, dtype=start.dtype) * step.reshape(())


def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Adds elements before and after the last dimensions; ``pad`` holds two numbers for each.

    The modes are ``constant``, ``reflect`` (the edge is not repeated) and ``replicate`` (the edge
    is repeated).
    """
    before_after = list(pad)
    dims = len(before_after) // 2
    check_shape(
        [
            *x.shape[: x.dim() - dims],
            *(
                size + low + high
                for size, low, high in zip(
                    x.shape[x.dim() - dims :], before_after[::2], before_after[1::2], strict=True
                )
            ),
        ]
    )
    if mode == "constant":
        flat = [n for dim in reversed(range(dims)) for n in before_after[2 * dim : 2 * dim + 2]]
        return F.pad(x, flat, value=constant_val)
    if mode not in ("reflect", "reflection", "replicate"):
        raise DeviceError(f"pad has no mode {mode}; it has constant, reflect and replicate")
    for dim in range(dims):
        axis = x.dim() - dims + dim
        size, (low, high) = x.shape[axis], before_after[2 * dim : 2 * dim + 2]
        place = torch.arange(-low, size + high)
        if mode == "replicate":
            place = place.clamp(0, size - 1)
        else:
            if max(low, high) >= size:
                raise DeviceError(f"{size} elements cannot be reflected {max(low, high)} times")
            place = (size - 1) - (place.abs() - (size - 1)).abs()
        x = x.index_select(axis, place)
    return x


def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Reverses the order of the elements along ``axes``, by default along all."""
    return x.flip(tuple(range(x.dim())) if axes is None else axes)


def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Reverses the first ``lengths[i]`` elements along ``seq_axis`` for each element of a batch."""
    moved = x.movedim((batch_axis, seq_axis), (0, 1)).clone()
    for row, length in zip(moved, lengths.tolist(), strict=True):
        row[:length] = row[:length].flip(0)
    return moved.movedim((0, 1), (batch_axis, seq_axis)).contiguous()


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Sets elements outside a band around the diagonal to zero; -1 keeps a whole side.

    The diagonal is that of the last two dimensions.
    """
    kept = x.clone()
    if lower >= 0:
        kept = kept.triu(-lower)
    return kept.tril(upper) if upper >= 0 else kept


def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """``on_value`` at each index along a new dimension, ``off_value`` elsewhere."""
    check_shape((*indices.shape, one_hot_vector_size))
    where = torch.arange(one_hot_vector_size) == indices.unsqueeze(-1)
    on = torch.ones((), dtype=torch.int32) if on_value is None else on_value
    off = torch.zeros((), dtype=torch.int32) if off_value is None else off_value
    return torch.where(where, on, off).movedim(-1, axis)


def non_zero(x: Tensor) -> Tensor:
    """The indices of the elements that are not zero, one row for each element."""
    return torch.nonzero(x)


def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """Windows of ``size`` elements along ``axis``; a new dimension after it holds each window."""
    at = axis % x.dim()
    return x.unfold(at, size, stride).movedim(-1, at + 1)


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Moves channels into blocks of pixels; the block is the outer part of the channel's index."""
    n, c, h, w = x.shape
    b = block_size
    spread = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return spread.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """Moves blocks of pixels into channels, which undoes depth_to_space."""
    n, c, h, w = x.shape
    b = block_size
    gathered = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return gathered.reshape(n, c * b * b, h // b, w // b)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Moves channels into blocks of pixels; the block is the inner part of the channel's index."""
    return F.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Moves blocks of pixels into channels, which undoes pixel_shuffle."""
    return F.pixel_unshuffle(x, downscale_factor)


def space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints) -> Tensor:
    """Pads, then moves blocks of pixels into the batch."""
    x = F.pad(x, (paddings[2], paddings[3], paddings[0], paddings[1]))
    n, c, h, w = x.shape
    a, b = block_shape
    blocks = x.reshape(n, c, h // a, a, w // b, b).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(n * a * b, c, h // a, w // b)


def batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    """Moves the batch into blocks of pixels, then crops."""
    n, c, h, w = x.shape
    a, b = block_shape
    pixels = x.reshape(a, b, n // (a * b), c, h, w).permute(2, 3, 4, 0, 5, 1)
    pixels = pixels.reshape(n // (a * b), c, h * a, w * b)
    return pixels[:, :, crops[0] : h * a - crops[1], crops[2] : w * b - crops[3]]


OPS: Final[dict[str, Operation]] = {
    "reshape": reshape,
    "reshape_like": reshape_like,
    "transpose": transpose,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "flatten2d": flatten2d,
    "shape": shape_of,
    "identity": identity,
    "concat": concat,
    "stack": stack,
    "split": split,
    "tile": tile,
    "fill": fill,
    "fill_like": fill_like,
    "range_1d": range_1d,
    "pad": pad,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "band_part": band_part,
    "one_hot": one_hot,
    "non_zero": non_zero,
    "sliding_windows": sliding_windows,
    "depth_to_space": depth_to_space,
    "space_to_depth": space_to_depth,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "space_to_batch": space_to_batch,
    "batch_to_space": batch_to_space,
}
