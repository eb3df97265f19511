"""One row for every operation of the interpreter: what it is given, and who says what it gives.

``MIL`` rows ask coremltools' own ``value_inference``; others ask PyTorch or NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

MIL = "mil"
Arguments = dict[str, Any]


class Draw:
    """Shapes, numbers and choices, drawn by hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._rng = np.random.default_rng(self.int(0, 10_000))

    def int(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def pick(self, *choices: Any) -> Any:
        return self._data.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return self.pick(False, True)

    def shape(self, low: int = 1, high: int = 4, largest: int = 4) -> tuple[int, ...]:
        return tuple(self.int(1, largest) for _ in range(self.int(low, high)))

    def axis(self, rank: int) -> int:
        return self.int(-rank, rank - 1)

    def axes(self, rank: int) -> list[int]:
        chosen = [axis for axis in range(rank) if self.flag()] or [0]
        return [axis - rank if self.flag() else axis for axis in chosen]

    def floats(
        self, shape: tuple[int, ...], low: float = -3, high: float = 3
    ) -> np.ndarray[Any, Any]:
        return self._rng.uniform(low, high, shape).astype(np.float32)

    def ints(self, shape: tuple[int, ...], low: int = -5, high: int = 6) -> np.ndarray[Any, Any]:
        return self._rng.integers(low, high, shape).astype(np.int32)

    def bools(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._rng.integers(0, 2, shape).astype(bool)

    def codes(self, bits: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._rng.integers(0, 1 << bits, shape).astype(np.uint8)

    def broadcast(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Two shapes that broadcast, of the same rank or not."""
        full = self.shape()
        one = tuple(1 if self.flag() else dim for dim in full)
        other = tuple(1 if self.flag() else dim for dim in full)[self.int(0, len(full) - 1) :]
        return (one, other) if self.flag() else (other, one)


@dataclass(frozen=True)
class Row:
    """How an operation is checked.

    Attributes:
        make: draws arguments.
        oracle: `MIL`, or what computes the result from the same arguments.
        opset: generation of coremltools' operation.
        tolerance: of floats, relative and absolute.
    """

    make: Callable[[Draw], Arguments]
    oracle: Any = MIL
    opset: str = "iOS17"
    tolerance: float = 2e-6


def unary(low: float = -3, high: float = 3) -> Row:
    return Row(lambda d: {"x": d.floats(d.shape(), low, high)})


def binary(low: float = -3, high: float = 3) -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        return {"x": d.floats(one, low, high), "y": d.floats(other, low, high)}

    return Row(make)


def whole_binary(low: int, high: int) -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        if d.flag():
            return {"x": d.ints(one, low, high), "y": d.ints(other, low, high)}
        return {"x": d.floats(one, low, high), "y": d.floats(other, low, high)}

    return Row(make)


def comparison() -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        return {"x": d.ints(one, 0, 3), "y": d.ints(other, 0, 3)}

    return Row(make)


def logical() -> Row:
    def make(d: Draw) -> Arguments:
        one, other = d.broadcast()
        return {"x": d.bools(one), "y": d.bools(other)}

    return Row(make)


def activation(**factors: tuple[float, float]) -> Row:
    def make(d: Draw) -> Arguments:
        numbers = {name: np.float32(d.floats((), *ends)) for name, ends in factors.items()}
        return {"x": d.floats(d.shape()), **numbers}

    return Row(make)


def of_channels(*names: str) -> Row:
    def make(d: Draw) -> Arguments:
        shape = d.shape(4, 4)
        return {"x": d.floats(shape), **{name: d.floats((shape[1],), 0.1, 2) for name in names}}

    return Row(make)


def reduction(low: float = -3, high: float = 3) -> Row:
    def make(d: Draw) -> Arguments:
        x = d.floats(d.shape(), low, high)
        chosen = {} if d.flag() else {"axes": np.array(d.axes(x.ndim), np.int32)}
        return {"x": x, **chosen, "keep_dims": d.flag()}

    return Row(make)


def whole_reduction() -> Row:
    def make(d: Draw) -> Arguments:
        shape = d.shape(largest=3)
        x = d.ints(shape) if d.flag() else d.floats(shape)
        return {"x": x, "axes": np.array(d.axes(x.ndim), np.int32), "keep_dims": d.flag()}

    return Row(make)


def argument_reduction() -> Row:
    def make(d: Draw) -> Arguments:
        x = d.floats(d.shape())
        return {"x": x, "axis": np.int32(d.axis(x.ndim)), "keep_dims": d.flag()}

    return Row(make)


def make_slice(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3, 6))
    begin, end, stride, squeeze = [], [], [], []
    for size in x.shape:
        step = d.pick(1, 1, 2, -1, -2)
        first, last = sorted((d.int(0, size - 1), d.int(0, size - 1)))
        begin.append(first if step > 0 else last)
        end.append(last + 1 if step > 0 else first)
        stride.append(step)
        squeeze.append(d.pick(False, False, True) and x.ndim > 1 and not all(squeeze[1:]))
    if all(squeeze):
        squeeze[0] = False
    masks = [d.flag() and not single for single in squeeze]
    ends = [d.flag() for _ in squeeze]
    # A slice backwards down to the first element needs its end ignored.
    ends = [end or (step < 0) for end, step in zip(ends, stride, strict=True)]
    return {
        "x": x,
        "begin": np.array(begin, np.int32),
        "end": np.array(end, np.int32),
        "stride": np.array(stride, np.int32),
        "begin_mask": np.array(masks),
        "end_mask": np.array(ends),
        "squeeze_mask": np.array(squeeze),
    }


def slices_of(given: Arguments) -> tuple[Any, ...]:
    found: list[Any] = []
    for axis in range(given["x"].ndim):
        if given["squeeze_mask"][axis]:
            found.append(int(given["begin"][axis]))
            continue
        first = None if given["begin_mask"][axis] else int(given["begin"][axis])
        last = None if given["end_mask"][axis] else int(given["end"][axis])
        found.append(slice(first, last, int(given["stride"][axis])))
    return tuple(found)


def sliced(**given: Any) -> np.ndarray[Any, Any]:
    return np.asarray(given["x"][slices_of(given)])


def make_update(d: Draw) -> Arguments:
    given = make_slice(d)
    return {**given, "update": d.floats(np.asarray(given["x"][slices_of(given)]).shape)}


def updated(update: np.ndarray[Any, Any], **given: Any) -> np.ndarray[Any, Any]:
    whole = given["x"].copy()
    whole[slices_of(given)] = update
    return whole


def make_gather(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3))
    axis = d.axis(x.ndim)
    indices = d.ints(d.shape(1, 2), 0, x.shape[axis])
    return {"x": x, "indices": indices, "axis": np.int32(axis), "batch_dims": np.int32(0)}


def make_along(d: Draw) -> Arguments:
    x = d.floats(d.shape(1, 3))
    axis = d.axis(x.ndim)
    shape = list(x.shape)
    shape[axis] = d.int(1, 5)
    indices = d.ints(tuple(shape), 0, x.shape[axis])
    return {"x": x, "indices": indices, "axis": np.int32(axis)}


def make_scatter_along(d: Draw) -> Arguments:
    given = make_along(d)
    given["data"] = given.pop("x")
    given["updates"] = d.floats(given["indices"].shape, 0.5, 2)
    return {**given, "mode": d.pick("add", "sub", "mul", "div", "max", "min")}


SCATTER = {
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": np.divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def scattered_along(data: Any, indices: Any, updates: Any, axis: Any, mode: str) -> Any:
    whole, places = data.copy(), list(np.indices(indices.shape))
    places[axis] = indices
    SCATTER[mode](whole, tuple(places), updates)
    return whole


def make_scatter(d: Draw) -> Arguments:
    data = d.floats(d.shape(1, 3))
    axis = d.axis(data.ndim)
    shape = list(data.shape)
    shape[axis] = d.int(1, 4)
    return {
        "data": data,
        "indices": d.ints((shape[axis],), 0, data.shape[axis]),
        "updates": d.floats(tuple(shape), 0.5, 2),
        "axis": np.int32(axis),
        "mode": d.pick(*SCATTER),
    }


def scattered(data: Any, indices: Any, updates: Any, axis: Any, mode: str) -> Any:
    whole = np.moveaxis(data.copy(), axis, 0)
    SCATTER[mode](whole, indices, np.moveaxis(updates, axis, 0))
    return np.moveaxis(whole, 0, axis)


def make_scatter_nd(d: Draw) -> Arguments:
    data = d.floats(d.shape(1, 3))
    depth, count = d.int(1, data.ndim), d.int(1, 4)
    indices = np.stack([d.ints((count,), 0, size) for size in data.shape[:depth]], -1)
    updates = d.floats((count, *data.shape[depth:]), 0.5, 2)
    return {"data": data, "indices": indices, "updates": updates, "mode": d.pick(*SCATTER)}


def scattered_nd(data: Any, indices: Any, updates: Any, mode: str) -> Any:
    whole = data.copy()
    SCATTER[mode](whole, tuple(np.moveaxis(indices, -1, 0)), updates)
    return whole


def make_gather_nd(d: Draw) -> Arguments:
    x = d.floats(d.shape(2, 3))
    depth = d.int(1, x.ndim)
    indices = np.stack([d.ints((3,), 0, size) for size in x.shape[:depth]], -1)
    return {"x": x, "indices": indices}


def make_conv(d: Draw) -> Arguments:
    rank, groups = d.int(1, 3), d.pick(1, 1, 2)
    inner, outer = groups * d.int(1, 2), groups * d.int(1, 2)
    kernel = tuple(d.int(1, 3) for _ in range(rank))
    pads = [d.int(0, 2) for _ in range(2 * rank)]
    given = {
        "x": d.floats((d.int(1, 2), inner, *(d.int(5, 7) for _ in kernel))),
        "weight": d.floats((outer, inner // groups, *kernel)),
        "strides": np.array([d.int(1, 2) for _ in kernel], np.int32),
        "dilations": np.array([d.int(1, 2) for _ in kernel], np.int32),
        "groups": np.int32(groups),
        "pad_type": d.pick("valid", "custom", "same", "same_lower"),
        "pad": np.array(pads, np.int32),
    }
    return {**given, "bias": d.floats((outer,))} if d.flag() else given


def around(given: Arguments, kernel: Any) -> list[int]:
    """Padding in the order of `torch.nn.functional.pad`, as TensorFlow defines SAME."""
    found: list[int] = []
    for dim, length in enumerate(kernel):
        size, step = given["x"].shape[2 + dim], int(given["strides"][dim])
        if given["pad_type"] == "valid":
            ends = (0, 0)
        elif given["pad_type"] == "custom":
            ends = (int(given["pad"][2 * dim]), int(given["pad"][2 * dim + 1]))
        else:
            total = max(0, (math.ceil(size / step) - 1) * step + length - size)
            ends = (total // 2, total - total // 2)
            ends = ends[::-1] if given["pad_type"] == "same_lower" else ends
        found = [*ends, *found]
    return found


def convolved(**given: Any) -> torch.Tensor:
    x, weight = torch.from_numpy(given["x"]), torch.from_numpy(given["weight"])
    gaps = given["dilations"].tolist()
    kernel = [(size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], gaps, strict=True)]
    bias = torch.from_numpy(given["bias"]) if "bias" in given else None
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    steps, groups = given["strides"].tolist(), int(given["groups"])
    return function(F.pad(x, around(given, kernel)), weight, bias, steps, 0, gaps, groups)


def make_conv_transpose(d: Draw) -> Arguments:
    rank, groups = d.int(1, 2), d.pick(1, 2)
    inner, outer = groups * d.int(1, 2), d.int(1, 2)
    given = {
        "x": d.floats((1, inner, *(d.int(3, 5) for _ in range(rank)))),
        "weight": d.floats((inner, outer, *(3 for _ in range(rank)))),
        "strides": np.array([d.int(1, 2) for _ in range(rank)], np.int32),
        "groups": np.int32(groups),
        "pad_type": d.pick("valid", "custom"),
        "pad": np.array([1] * 2 * rank, np.int32),
    }
    return {**given, "bias": d.floats((outer * groups,))} if d.flag() else given


def spread(**given: Any) -> torch.Tensor:
    x, weight = torch.from_numpy(given["x"]), torch.from_numpy(given["weight"])
    function = (F.conv_transpose1d, F.conv_transpose2d)[x.dim() - 3]
    bias = torch.from_numpy(given["bias"]) if "bias" in given else None
    padding = 1 if given["pad_type"] == "custom" else 0
    steps, groups = given["strides"].tolist(), int(given["groups"])
    return function(x, weight, bias, steps, padding, groups=groups)


def make_pool(d: Draw) -> Arguments:
    """Symmetric padding of at most half a window, as PyTorch's own pools take it."""
    rank = d.int(1, 2)
    kernel = [d.int(2, 3) for _ in range(rank)]
    pads = [d.int(0, 1) for _ in kernel]
    return {
        "x": d.floats((1, 2, *(d.int(5, 8) for _ in kernel))),
        "kernel_sizes": np.array(kernel, np.int32),
        "strides": np.array([d.int(1, 3) for _ in kernel], np.int32),
        "pad_type": "custom",
        "pad": np.repeat(np.array(pads, np.int32), 2),
        "ceil_mode": d.flag(),
    }


def make_average(d: Draw) -> Arguments:
    return {**make_pool(d), "exclude_padding_from_average": d.flag()}


def pooled(kind: str) -> Callable[..., torch.Tensor]:
    def pool(**given: Any) -> torch.Tensor:
        x = torch.from_numpy(given["x"])
        name = f"{'max' if kind == 'max' else 'avg'}_pool{x.dim() - 2}d"
        extra = (
            {"count_include_pad": not given["exclude_padding_from_average"]}
            if kind == "avg"
            else {}
        )
        return getattr(F, name)(
            x,
            given["kernel_sizes"].tolist(),
            given["strides"].tolist(),
            given["pad"][::2].tolist(),
            ceil_mode=bool(given["ceil_mode"]),
            **extra,
        )

    return pool


def l2_pooled(x: Any, kernel_sizes: Any, strides: Any, pad: Any, **_: Any) -> torch.Tensor:
    sides = [int(side) for side in pad[::2]]
    padded = F.pad(torch.from_numpy(x), [side for each in reversed(sides) for side in (each, each)])
    function = (F.lp_pool1d, F.lp_pool2d)[x.ndim - 3]
    kernel, steps = kernel_sizes.tolist(), strides.tolist()
    return function(padded, 2.0, kernel if x.ndim > 3 else kernel[0], steps)


def make_l2_pool(d: Draw) -> Arguments:
    return {**make_pool(d), "ceil_mode": False}


def make_batch_norm(d: Draw) -> Arguments:
    shape = d.shape(3, 5)
    channels = (shape[1],)
    given = {
        "x": d.floats(shape),
        "mean": d.floats(channels),
        "variance": d.floats(channels, 0.5, 2),
        "epsilon": np.float32(1e-3),
    }
    return {**given, "gamma": d.floats(channels), "beta": d.floats(channels)}


def batch_normed(x: Any, mean: Any, variance: Any, gamma: Any, beta: Any, epsilon: Any) -> Any:
    form = (-1, *[1] * (x.ndim - 2))
    scaled = (x - mean.reshape(form)) / np.sqrt(variance.reshape(form) + epsilon)
    return scaled * gamma.reshape(form) + beta.reshape(form)


def make_instance_norm(d: Draw) -> Arguments:
    shape = (*d.shape(2, 2), 4, 5)
    given = {"x": d.floats(shape), "epsilon": np.float32(1e-4)}
    return {**given, "gamma": d.floats((shape[1],)), "beta": d.floats((shape[1],))}


def instance_normed(x: Any, gamma: Any, beta: Any, epsilon: Any) -> torch.Tensor:
    parts = (torch.from_numpy(part) for part in (gamma, beta))
    return F.instance_norm(torch.from_numpy(x), None, None, *parts, eps=float(epsilon))


def make_layer_norm(d: Draw) -> Arguments:
    x = d.floats((*d.shape(1, 3), 5))
    axes = sorted({*range(d.int(0, x.ndim - 1), x.ndim)})
    shape = tuple(x.shape[axis] for axis in axes)
    given = {"x": x, "axes": np.array(axes, np.int32), "epsilon": np.float32(1e-3)}
    return {**given, "gamma": d.floats(shape), "beta": d.floats(shape)} if d.flag() else given


def make_linear(d: Draw) -> Arguments:
    inner, outer = d.int(1, 8), d.int(1, 8)
    given = {"x": d.floats((*d.shape(1, 2), inner)), "weight": d.floats((outer, inner))}
    return {**given, "bias": d.floats((outer,))} if d.flag() else given


def make_matmul(d: Draw) -> Arguments:
    batch, (m, k, n) = d.shape(0, 2), (d.int(1, 5) for _ in range(3))
    x, y = d.flag(), d.flag()
    other = batch if d.flag() else ()
    return {
        "x": d.floats((*batch, k, m) if x else (*batch, m, k)),
        "y": d.floats((*other, n, k) if y else (*other, k, n)),
        "transpose_x": x,
        "transpose_y": y,
    }


def make_einsum(d: Draw) -> Arguments:
    n, c, h, w, u = (d.int(1, 4) for _ in range(5))
    if d.flag():
        values = [d.floats((n, c, h, w)), d.floats((n, w, d.pick(1, h), u))]
        return {"values": values, "equation": "nchw,nwhu->nchu"}
    return {"values": [d.floats((c, h, w)), d.floats((w, h, u))], "equation": "chw,whr->chr"}


def make_attention(d: Draw) -> Arguments:
    batch, (queries, keys, width, out) = d.shape(1, 2), (d.int(1, 24) for _ in range(4))
    given = {
        "query": d.floats((*batch, queries, width)),
        "key": d.floats((*batch, keys, width)),
        "value": d.floats((*batch, keys, out)),
    }
    if d.flag():
        mask = d.bools((queries, keys))
        mask[:, 0] = True
        ends = np.where(mask, d.floats((queries, keys)), np.float32(d.pick(-9.0, -6e4)))
        given["attn_mask"] = mask if d.flag() else ends.astype(np.float32)
    return given


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


def make_blockwise(d: Draw) -> Arguments:
    """int8 and float data; four-bit data needs coremltools' own types and is in the packages."""
    blocks = (d.int(1, 3), d.int(1, 3))
    shape = tuple(count * d.int(1, 4) for count in blocks)
    data = d.ints(shape, -128, 128).astype(np.int8)
    scale = d.floats(blocks, 0.01, 0.1).astype(d.pick(np.float16, np.float32))
    given = {"data": data, "scale": scale}
    return {**given, "offset": d.ints(blocks, -9, 9).astype(np.int8)} if d.flag() else given


def make_affine(d: Draw) -> Arguments:
    shape = d.shape(2, 3)
    axis = d.int(0, len(shape) - 1)
    count: tuple[int, ...] = (shape[axis],) if d.flag() else ()
    return {
        "quantized_data": d.ints(shape, -128, 128).astype(np.int8),
        "zero_point": d.ints(count, -9, 9).astype(np.int8),
        "scale": d.floats(count, 0.01, 0.1),
        "axis": np.int32(axis),
    }


def make_lut_ios16(d: Draw) -> Arguments:
    shape = d.shape(1, 3)
    bits = d.pick(1, 2, 4, 6, 8)
    codes = d.codes(bits, (math.prod(shape),))
    spread_bits = (codes[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(spread_bits.reshape(-1).astype(np.uint8), bitorder="little")
    lut = d.floats((1 << bits,))
    return {"indices": packed, "lut": lut, "shape": np.array(shape, np.uint32)}


def make_sparse_ios16(d: Draw) -> Arguments:
    shape = d.shape(1, 3)
    mask = d.bools((math.prod(shape),))
    mask[0] = True
    values = d.floats((int(mask.sum()),))
    packed = np.packbits(mask, bitorder="little")
    return {"nonzero_data": values, "mask": packed, "shape": np.array(shape, np.uint32)}


def make_lut_to_sparse(d: Draw) -> Arguments:
    blocks = (d.int(1, 2), d.int(1, 2))
    shape = tuple(count * d.int(1, 3) for count in blocks)
    mask = d.bools(shape).astype(np.uint8)
    mask[0, 0] = 1
    width = d.pick(1, 2)
    given = {
        "indices_mask": mask,
        "indices_nonzero_data": d.codes(2, (int(mask.sum()),)),
        "lut": d.floats((*blocks, 4, width)),
    }
    return {**given, "vector_axis": np.int32(d.int(0, 1))} if width > 1 else given


def make_sparse_blockwise(d: Draw) -> Arguments:
    blocks = (d.int(1, 2), d.int(1, 2))
    shape = tuple(count * d.int(1, 3) for count in blocks)
    mask = d.bools(shape).astype(np.uint8)
    mask[0, 0] = 1
    return {
        "data_mask": mask,
        "nonzero_data": d.ints((int(mask.sum()),), -128, 128).astype(np.int8),
        "scale": d.floats(blocks, 0.01, 0.1),
        "offset": d.ints(blocks, -9, 9).astype(np.int8),
    }


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
    shape = d.shape()
    return {"cond": d.bools(shape), "a": d.floats(shape), "b": d.floats(shape)}


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


def make_lstm(d: Draw) -> Arguments:
    steps, batch, inner, hidden = d.int(1, 4), d.int(1, 2), d.int(1, 4), d.int(1, 3)
    both = d.flag()
    ways = 2 if both else 1
    given = {
        "x": d.floats((steps, batch, inner)),
        "initial_h": d.floats((batch, ways * hidden)),
        "initial_c": d.floats((batch, ways * hidden)),
        "direction": "bidirectional" if both else d.pick("forward", "reverse"),
        "output_sequence": d.flag(),
    }
    for end in ("", "_back")[:ways]:
        given["weight_ih" + end] = d.floats((4 * hidden, inner))
        given["weight_hh" + end] = d.floats((4 * hidden, hidden))
        given["bias" + end] = d.floats((4 * hidden,))
    return given


def lstm(direction: str, output_sequence: bool, **given: Any) -> tuple[Any, ...]:
    """By `torch.nn.LSTM`, whose gates are input, forget, cell, output."""
    parts = {name: torch.from_numpy(value) for name, value in given.items()}
    hidden, both = parts["weight_hh"].shape[1], direction == "bidirectional"
    layer = torch.nn.LSTM(parts["x"].shape[-1], hidden, bidirectional=both)

    def reordered(value: torch.Tensor) -> torch.Tensor:
        i, f, o, z = value.chunk(4)
        return torch.cat((i, f, z, o))

    named = {}
    for end, own in (("", ""), ("_back", "_reverse"))[: 2 if both else 1]:
        named[f"weight_ih_l0{own}"] = reordered(parts["weight_ih" + end])
        named[f"weight_hh_l0{own}"] = reordered(parts["weight_hh" + end])
        named[f"bias_ih_l0{own}"] = reordered(parts["bias" + end])
        named[f"bias_hh_l0{own}"] = torch.zeros(4 * hidden)
    layer.load_state_dict(named)
    first = [
        torch.stack(parts[name].chunk(2 if both else 1, -1)) for name in ("initial_h", "initial_c")
    ]
    x = parts["x"].flip(0) if direction == "reverse" else parts["x"]
    with torch.inference_mode():
        out, (h, c) = layer(x, tuple(first))
    out = out.flip(0) if direction == "reverse" else out
    last, memory = (torch.cat(tuple(each), -1) for each in (h, c))
    return out if output_sequence else last.unsqueeze(0), last, memory


def make_quantize(d: Draw) -> Arguments:
    x, kind = d.floats(d.shape()), d.pick(np.int8, np.uint8)
    axis = d.axis(x.ndim)
    shape: tuple[int, ...] = (x.shape[axis],) if d.flag() else ()
    points = np.asarray(d.ints(shape, 0, 9)).astype(kind)
    given = {
        "input": x,
        "scale": np.float32(d.floats(shape, 0.01, 0.1)),
        "zero_point": points if shape else kind(points),
        "output_dtype": np.dtype(kind).name,
    }
    return {**given, "axis": np.int32(axis)} if shape else given


def make_dequantize(d: Draw) -> Arguments:
    given = make_quantize(d)
    kind = given.pop("output_dtype")
    return {**given, "input": d.ints(given["input"].shape, 0, 100).astype(kind)}


ROWS: dict[str, Row] = {
    "lstm": Row(make_lstm, lstm, tolerance=1e-5),
    "quantize": Row(make_quantize),
    "dequantize": Row(make_dequantize),
    **{name: unary() for name in ("abs", "atan", "ceil", "cos", "erf", "exp", "exp2", "floor")},
    **{name: unary(-0.9, 0.9) for name in ("acos", "asin", "atanh", "tan")},
    **{name: unary() for name in ("cosh", "round", "sign", "sin", "sinh", "square", "tanh")},
    "sqrt": unary(0, 9),
    "inverse": unary(0.5, 3),
    "log": unary(0.1, 9),
    "rsqrt": unary(0.1, 9),
    "logical_not": Row(lambda d: {"x": d.bools(d.shape())}),
    "clip": Row(clipped),
    "threshold": activation(alpha=(-1, 1)),
    "cast": Row(casts),
    "select": Row(chosen),
    **{name: binary() for name in ("add", "sub", "mul", "maximum", "minimum")},
    "real_div": binary(0.5, 3),
    "pow": binary(0.5, 3),
    "floor_div": whole_binary(1, 9),
    "mod": whole_binary(1, 9),
    **{name: comparison() for name in ("equal", "not_equal", "greater", "greater_equal", "less")},
    "less_equal": comparison(),
    **{name: logical() for name in ("logical_and", "logical_or", "logical_xor")},
    **{name: activation() for name in ("relu", "relu6", "sigmoid", "softplus", "softsign")},
    "silu": Row(lambda d: {"x": d.floats(d.shape())}, lambda x: F.silu(torch.from_numpy(x))),
    "gelu": Row(
        lambda d: {
            "x": d.floats(d.shape()),
            "mode": d.pick("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"),
        },
    ),
    "elu": activation(alpha=(0.1, 2)),
    "leaky_relu": activation(alpha=(0.1, 0.9)),
    "thresholded_relu": activation(alpha=(-1, 1)),
    "linear_activation": activation(alpha=(-2, 2), beta=(-2, 2)),
    "clamped_relu": activation(alpha=(0.1, 0.9), beta=(0.5, 2)),
    "scaled_tanh": activation(alpha=(0.1, 2), beta=(0.1, 2)),
    "sigmoid_hard": activation(alpha=(0.1, 0.5), beta=(0.1, 0.9)),
    "prelu": of_channels("alpha"),
    "softplus_parametric": of_channels("alpha", "beta"),
    "softmax": along_axis(),
    **{name: whole_reduction() for name in ("reduce_sum", "reduce_max", "reduce_min")},
    "reduce_prod": whole_reduction(),
    **{name: reduction() for name in ("reduce_mean", "reduce_l1_norm", "reduce_l2_norm")},
    "reduce_sum_square": reduction(),
    "reduce_log_sum": reduction(0.5, 3),
    "reduce_log_sum_exp": reduction(),
    "reduce_argmax": argument_reduction(),
    "reduce_argmin": argument_reduction(),
    "cumsum": Row(along_axis(exclusive=True, reverse=True).make, running_sum),
    "argsort": along_axis(ascending=True),
    "topk": Row(make_topk),
    "reshape": Row(shape_pair),
    "reshape_like": Row(make_like, lambda x, **_: x.reshape(6, 5)),
    "transpose": Row(to_permute),
    "expand_dims": Row(with_axes),
    "squeeze": Row(make_squeeze),
    "flatten2d": Row(
        lambda d: {"x": d.floats(d.shape(2)), "axis": np.int32(d.int(1, 2))},
        lambda x, axis: x.reshape(math.prod(x.shape[:axis]), -1),
    ),
    "shape": Row(lambda d: {"x": d.floats(d.shape())}),
    "identity": Row(lambda d: {"x": d.floats(d.shape())}),
    "concat": Row(make_concat, concatenated),
    "stack": Row(
        lambda d: {"values": [d.floats((2, 3)) for _ in range(d.int(1, 3))], "axis": d.axis(3)},
        lambda values, axis: np.stack(values, axis),
    ),
    "split": Row(make_split),
    "tile": Row(repeated),
    "fill": Row(
        lambda d: {"shape": np.array(d.shape(), np.int32), "value": np.float32(d.floats(()))}
    ),
    "fill_like": Row(
        lambda d: {"ref_tensor": d.floats(d.shape()), "value": np.float32(d.floats(()))}
    ),
    "range_1d": Row(make_range),
    "pad": Row(make_pad, padded),
    "reverse": Row(lambda d: {"x": d.floats((2, 3)), "axes": np.array(d.axes(2), np.int32)}),
    "reverse_sequence": Row(make_reverse_sequence, reversed_sequence),
    "band_part": Row(
        lambda d: {
            "x": d.floats((2, 4, 5)),
            "lower": np.int32(d.int(-1, 3)),
            "upper": np.int32(d.int(-1, 3)),
        }
    ),
    "one_hot": Row(make_one_hot, one_hot),
    "non_zero": Row(lambda d: {"x": d.ints((3, 4), 0, 2)}),
    "sliding_windows": Row(make_window, windows),
    "depth_to_space": Row(
        lambda d: {"x": d.floats((1, 8, 2, 3)), "block_size": np.int32(2)}, from_depth
    ),
    "space_to_depth": Row(make_space, to_depth),
    "pixel_shuffle": Row(
        lambda d: {"x": d.floats((1, 8, 2, 3)), "upscale_factor": np.int32(2)},
        lambda x, upscale_factor: F.pixel_shuffle(torch.from_numpy(x), int(upscale_factor)),
    ),
    "pixel_unshuffle": Row(
        lambda d: {"x": d.floats((1, 2, 4, 6)), "downscale_factor": np.uint32(2)},
        lambda x, downscale_factor: F.pixel_unshuffle(torch.from_numpy(x), int(downscale_factor)),
    ),
    "space_to_batch": Row(make_space_to_batch, to_batch),
    "batch_to_space": Row(make_batch_to_space, from_batch),
    "slice_by_index": Row(make_slice, sliced),
    "slice_by_size": Row(make_sized_slice),
    "slice_update": Row(make_update, updated),
    "gather": Row(make_gather),
    "gather_along_axis": Row(make_along),
    "gather_nd": Row(make_gather_nd, lambda x, indices: x[tuple(np.moveaxis(indices, -1, 0))]),
    "scatter": Row(make_scatter, scattered),
    "scatter_along_axis": Row(make_scatter_along, scattered_along),
    "scatter_nd": Row(make_scatter_nd, scattered_nd),
    "conv": Row(make_conv, convolved, tolerance=1e-5),
    "conv_transpose": Row(make_conv_transpose, spread, tolerance=1e-5),
    "max_pool": Row(make_pool, pooled("max")),
    "avg_pool": Row(make_average, pooled("avg")),
    "l2_pool": Row(make_l2_pool, l2_pooled, tolerance=1e-5),
    "batch_norm": Row(make_batch_norm, batch_normed, tolerance=1e-5),
    "instance_norm": Row(make_instance_norm, instance_normed, tolerance=1e-5),
    "layer_norm": Row(make_layer_norm, tolerance=1e-5),
    "l2_norm": Row(lambda d: {"x": d.floats(d.shape(3, 4)), "epsilon": np.float32(1e-3)}),
    "local_response_norm": Row(
        lambda d: {"x": d.floats((1, 6, 3, 3)), "size": np.int32(3), "alpha": np.float32(0.1)},
        lambda x, size, alpha: F.local_response_norm(torch.from_numpy(x), int(size), float(alpha)),
    ),
    "linear": Row(make_linear, tolerance=1e-5),
    "matmul": Row(make_matmul, tolerance=1e-5),
    "einsum": Row(make_einsum, tolerance=1e-5),
    "scaled_dot_product_attention": Row(make_attention, MIL, "iOS18", 1e-5),
    "upsample_nearest_neighbor": Row(
        lambda d: {
            "x": d.floats((1, 2, 3, 4)),
            "scale_factor_height": np.float32(d.int(1, 3)),
            "scale_factor_width": np.float32(d.int(1, 3)),
        },
        nearest,
    ),
    "resize_nearest_neighbor": Row(
        lambda d: {
            "x": d.floats((1, 2, d.int(2, 5), d.int(2, 5))),
            "target_size_height": np.int32(d.int(1, 9)),
            "target_size_width": np.int32(d.int(1, 9)),
        },
        nearest,
    ),
    "upsample_bilinear": Row(make_bilinear, upsampled, tolerance=1e-5),
    "resize_bilinear": Row(make_resize, resized, tolerance=1e-5),
    "crop": Row(
        lambda d: {
            "x": d.floats((1, 2, 6, 7)),
            "crop_height": np.array([d.int(0, 2), 1], np.int32),
            "crop_width": np.array([1, d.int(0, 2)], np.int32),
        },
        lambda x, crop_height, crop_width: x[
            ..., crop_height[0] : 6 - crop_height[1], crop_width[0] : 7 - crop_width[1]
        ],
    ),
    "constexpr_blockwise_shift_scale": Row(make_blockwise, MIL, "iOS18", 1e-3),
    "constexpr_affine_dequantize": Row(make_affine, MIL, "iOS16"),
    "constexpr_lut_to_dense": Row(make_lut_ios16, MIL, "iOS16"),
    "constexpr_sparse_to_dense": Row(make_sparse_ios16, MIL, "iOS16"),
    "constexpr_lut_to_sparse": Row(make_lut_to_sparse, MIL, "iOS18"),
    "constexpr_sparse_blockwise_shift_scale": Row(make_sparse_blockwise, MIL, "iOS18"),
    "constexpr_cast": Row(
        lambda d: {"source_val": d.floats(d.shape()).astype(np.float16), "output_dtype": "fp32"},
        MIL,
        "iOS16",
    ),
}
# Operations that have no meaning outside a program: tests of their own run them in one.
IN_PROGRAMS = frozenset({"read_state", "write_state", "coreml_update_state", "cond", "while_loop"})
