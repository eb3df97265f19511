"""Arguments and results of operations on shapes and images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.oracles.mil_rows.draw import Arguments, Draw, Row


def make_concat(d: Draw) -> Arguments:
    shape = list(d.shape())
    axis = d.axis(len(shape))
    parts = []
    interleave = d.flag()
    for _ in range(d.int(1, 3)):
        parts.append(d.floats(tuple(shape)))
        if not interleave:
            shape[axis] = d.int(1, 4)
    return {"values": parts, "axis": np.int32(axis), "interleave": interleave}


def concatenated(values: Any, axis: Any, interleave: bool) -> Any:
    if not interleave:
        return np.concatenate(values, axis)
    moved = [np.moveaxis(value, axis, 0) for value in values]
    turns = [part[index] for index in range(len(moved[0])) for part in moved]
    return np.moveaxis(np.stack(turns), 0, axis)


def make_split(d: Draw) -> Arguments:
    shape = list(d.shape())
    axis = d.axis(len(shape))
    if d.flag():
        shape[axis] = 6
        return {"x": d.floats(tuple(shape)), "axis": np.int32(axis), "num_splits": np.int32(3)}
    sizes = [d.int(1, 3) for _ in range(d.int(2, 3))]
    shape[axis] = sum(sizes)
    sized = {"axis": np.int32(axis), "split_sizes": np.array(sizes, np.int32)}
    return {"x": d.floats(tuple(shape)), **sized}


def make_pad(d: Draw) -> Arguments:
    mode = d.pick("constant", "reflect", "replicate")
    x = d.floats((*d.shape(1, 2), 4, 5))
    most = 3 if mode == "constant" else 2
    sides = np.array([d.int(0, most) for _ in range(4)], np.int32)
    return {"x": x, "pad": sides, "mode": mode, "constant_val": np.float32(d.floats(()))}


def padded(x: Any, pad: Any, mode: str, constant_val: Any) -> Any:
    ends = [(0, 0)] * (x.ndim - 2) + [tuple(pad[:2]), tuple(pad[2:])]
    if mode == "constant":
        return np.pad(x, ends, constant_values=constant_val)
    return np.pad(x, ends, mode="edge" if mode == "replicate" else "reflect")


def make_topk(d: Draw) -> Arguments:
    x = d.floats(d.shape())
    axis = d.axis(x.ndim)
    return {
        "x": x,
        "k": np.int32(d.int(1, x.shape[axis])),
        "axis": np.int32(axis),
        "ascending": d.flag(),
    }


def make_one_hot(d: Draw) -> Arguments:
    size = d.int(1, 5)
    indices = d.ints(d.shape(1, 2), 0, size)
    axis = d.axis(indices.ndim + 1)
    on, off = np.float32(d.floats(())), np.float32(d.floats(()))
    sized = {"one_hot_vector_size": np.int32(size), "axis": np.int32(axis)}
    return {"indices": indices, **sized, "on_value": on, "off_value": off}


def one_hot(
    indices: Any, one_hot_vector_size: Any, axis: Any, on_value: Any, off_value: Any
) -> Any:
    rows = np.eye(one_hot_vector_size, dtype=bool)[indices]
    return np.moveaxis(np.where(rows, on_value, off_value), -1, axis)


def make_reverse_sequence(d: Draw) -> Arguments:
    x = d.floats((3, 4, 2))
    lengths = d.ints((3,), 0, 5)
    return {"x": x, "lengths": lengths, "seq_axis": np.int32(1), "batch_axis": np.int32(0)}


def reversed_sequence(x: Any, lengths: Any, **_: Any) -> Any:
    whole = x.copy()
    for row, length in enumerate(lengths):
        whole[row, :length] = x[row, :length][::-1]
    return whole


def make_space(d: Draw) -> Arguments:
    return {"x": d.floats((d.int(1, 2), d.int(1, 3), 4, 6)), "block_size": np.int32(2)}


def to_depth(x: Any, block_size: Any) -> Any:
    b = int(block_size)
    parts = [x[:, :, row::b, column::b] for row in range(b) for column in range(b)]
    return np.concatenate(parts, 1)


def from_depth(x: Any, block_size: Any) -> Any:
    b, channels = int(block_size), x.shape[1] // int(block_size) ** 2
    out = np.zeros((x.shape[0], channels, x.shape[2] * b, x.shape[3] * b), x.dtype)
    for place in range(b * b):
        part = x[:, place * channels : (place + 1) * channels]
        out[:, :, place // b :: b, place % b :: b] = part
    return out


def make_space_to_batch(d: Draw) -> Arguments:
    sides = np.array([[1, 1], [0, 2]], np.int32)
    blocks = np.array([2, 3], np.int32)
    return {"x": d.floats((d.int(1, 2), 2, 4, 4)), "block_shape": blocks, "paddings": sides}


def to_batch(x: Any, block_shape: Any, paddings: Any) -> Any:
    padded_x = np.pad(x, [(0, 0), (0, 0), tuple(paddings[0]), tuple(paddings[1])])
    a, b = block_shape
    return np.concatenate([padded_x[:, :, i::a, j::b] for i in range(a) for j in range(b)])


def make_batch_to_space(d: Draw) -> Arguments:
    crops = np.array([[1, 0], [0, 1]], np.int32)
    blocks = np.array([2, 3], np.int32)
    return {"x": d.floats((6 * d.int(1, 2), 2, 3, 2)), "block_shape": blocks, "crops": crops}


def from_batch(x: Any, block_shape: Any, crops: Any) -> Any:
    (a, b), count = block_shape, len(x) // (block_shape[0] * block_shape[1])
    whole = np.zeros((count, x.shape[1], x.shape[2] * a, x.shape[3] * b), x.dtype)
    for place in range(a * b):
        part = x[place * count : (place + 1) * count]
        whole[:, :, place // b :: a, place % b :: b] = part
    (top, bottom), (left, right) = crops
    return whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]


def make_bilinear(d: Draw) -> Arguments:
    corners = d.flag()
    given = {
        "x": d.floats((1, 2, d.int(2, 5), d.int(2, 5))),
        "scale_factor_height": np.float32(d.int(1, 3)),
        "scale_factor_width": np.float32(d.int(1, 3)),
        "align_corners": corners,
    }
    return given


def upsampled(x: Any, align_corners: bool, **factors: Any) -> torch.Tensor:
    size = [int(x.shape[2] * factors["scale_factor_height"])]
    size.append(int(x.shape[3] * factors["scale_factor_width"]))
    return F.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=align_corners)


def make_resize(d: Draw) -> Arguments:
    return {
        "x": d.floats((1, 2, d.int(2, 5), d.int(2, 5))),
        "target_size_height": np.int32(d.int(2, 9)),
        "target_size_width": np.int32(d.int(2, 9)),
        "sampling_mode": d.pick("STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS"),
    }


def resized(
    x: Any, target_size_height: Any, target_size_width: Any, sampling_mode: str
) -> torch.Tensor:
    size = [int(target_size_height), int(target_size_width)]
    corners = sampling_mode == "STRICT_ALIGN_CORNERS"
    return F.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=corners)


def nearest(x: Any, **given: Any) -> torch.Tensor:
    sizes = [int(given.get(f"target_size_{side}", 0)) for side in ("height", "width")]
    for place, side in enumerate(("height", "width")):
        if f"scale_factor_{side}" in given:
            sizes[place] = x.shape[2 + place] * int(given[f"scale_factor_{side}"])
    return F.interpolate(torch.from_numpy(x), sizes, mode="nearest")


def shape_pair(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3))
    kind = d.int(0, 2)
    wanted = [[-1], [x.shape[0], -1], [0] * x.ndim][kind]
    return {"x": x, "shape": np.array(wanted, np.int32)}


def with_axes(d: Draw) -> Arguments:
    x = d.floats(d.shape())
    rank = x.ndim + d.int(1, 2)
    axes = sorted({d.int(0, rank - 1) for _ in range(rank - x.ndim)})
    while len(axes) < rank - x.ndim:
        axes.append(next(axis for axis in range(rank) if axis not in axes))
    return {"x": x, "axes": np.array(axes, np.int32)}


def make_squeeze(d: Draw) -> Arguments:
    x = d.floats((1, *d.shape(1, 2), 1))
    return {"x": x} if d.flag() else {"x": x, "axes": np.array([0, -1], np.int32)}


def make_window(d: Draw) -> Arguments:
    x = d.floats((3, 6, 2))
    return {"x": x, "axis": np.int32(d.pick(1, -2)), "size": np.int32(3), "stride": np.int32(2)}


def windows(x: Any, axis: Any, size: Any, stride: Any) -> Any:
    found = np.lib.stride_tricks.sliding_window_view(x, int(size), 1)[:, :: int(stride)]
    return np.moveaxis(found, -1, 2)


def make_sized_slice(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3))
    begin = [d.int(0, size - 1) for size in x.shape]
    size = [d.pick(-1, dim - first) for dim, first in zip(x.shape, begin, strict=True)]
    return {"x": x, "begin": np.array(begin, np.int32), "size": np.array(size, np.int32)}


def make_range(d: Draw) -> Arguments:
    start, step = d.int(-5, 5), d.pick(1, 2, 3)
    count = d.int(1, 5)
    numbers = {"start": start, "end": start + step * count, "step": step}
    kind = np.int32 if d.flag() else np.float32
    return {name: kind(value) for name, value in numbers.items()}


def make_like(d: Draw) -> Arguments:
    return {
        "x": d.floats((2, 3, 5)),
        "ref_tensors": [d.floats((6, 2)), d.floats((1, 5))],
        "begins": [np.int32(0), np.int32(1)],
        "ends": [np.int32(1), np.int32(0)],
        "end_masks": [np.bool_(False), np.bool_(True)],
    }


def clipped(d: Draw) -> Arguments:
    low, high = sorted(d.floats((2,)).tolist())
    return {"x": d.floats(d.shape()), "alpha": np.float32(low), "beta": np.float32(high)}


def chosen(d: Draw) -> Arguments:
    one, other = d.broadcast()
    cond = tuple(1 if d.flag() else dim for dim in np.broadcast_shapes(one, other))
    return {"cond": d.bools(cond), "a": d.floats(one), "b": d.floats(other)}


def casts(d: Draw) -> Arguments:
    x = d.pick(d.floats(d.shape(), -9, 9), d.ints(d.shape()), d.bools(d.shape()))
    return {"x": x, "dtype": d.pick("int32", "fp32", "bool")}


def along_axis(name: str = "x", **flags: Any) -> Row:
    def make(d: Draw) -> Arguments:
        x = d.floats(d.shape())
        drawn = {flag: d.flag() for flag in flags}
        return {name: x, "axis": np.int32(d.axis(x.ndim)), **drawn}

    return Row(make)


def running_sum(x: Any, axis: Any, exclusive: bool, reverse: bool) -> Any:
    along = np.flip(x, axis) if reverse else x
    total = np.cumsum(along, axis) - (along if exclusive else 0)
    return np.flip(total, axis) if reverse else total


def to_permute(d: Draw) -> Arguments:
    x = d.floats(d.shape())
    order = np.argsort(d.floats((x.ndim,))).astype(np.int32)
    return {"x": x, "perm": order}


def repeated(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3))
    return {"x": x, "reps": d.ints((x.ndim,), 1, 4)}
