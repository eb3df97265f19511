"""Arguments and results of convolutions, pools, norms, products, attention, LSTMs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.oracles.mil_rows.draw import Arguments, Draw


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
