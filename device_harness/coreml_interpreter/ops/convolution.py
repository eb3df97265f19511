"""Convolutions and pooling in one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_shape
from device_harness.coreml_interpreter.ops.kinds import Ints, Operation
from device_harness.errors import DeviceError

_CONV: Final[tuple[Any, ...]] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: Final[tuple[Any, ...]] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_AVERAGE: Final[tuple[Any, ...]] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_LARGEST: Final[tuple[Any, ...]] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_PADS: Final = ("valid", "custom", "same", "same_lower")


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """The convolution of ``x [n, C, ...]`` with ``weight [C_out, C / groups, ...]``."""
    rank = x.dim() - 2
    steps, spread = strides or (1,) * rank, dilations or (1,) * rank
    kernel = [(size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], spread, strict=True)]
    around = _padding(x.shape[2:], kernel, steps, pad_type, pad)
    return _of_rank(_CONV, rank)(_padded(x, around, 0.0), weight, bias, steps, 0, spread, groups)  # type: ignore[no-any-return]


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """The transposed convolution of ``x [n, C, ...]`` with ``weight [C, C_out / groups, ...]``.

    The result is cropped by ``pad``.
    """
    rank = x.dim() - 2
    steps, spread = strides or (1,) * rank, dilations or (1,) * rank
    kernel = [(size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], spread, strict=True)]
    check_shape(
        [
            x.shape[0],
            weight.shape[1] * groups,
            *(
                size * step + length
                for size, step, length in zip(x.shape[2:], steps, kernel, strict=True)
            ),
        ]
    )
    out = _of_rank(_TRANSPOSED, rank)(x, weight, None, steps, 0, 0, groups, spread)
    if pad_type not in _PADS:
        raise _unknown_pad(pad_type)
    cut: list[int] = []
    for dim in range(rank):
        whole = out.shape[2 + dim]
        before, after = (pad or (0,) * 2 * rank)[2 * dim : 2 * dim + 2]
        if pad_type.startswith("same"):
            wanted = (
                x.shape[2 + dim] * steps[dim] if output_shape is None else output_shape[2 + dim]
            )
            total = whole - wanted
            before = total - total // 2 if pad_type == "same_lower" else total // 2
            after = total - before
        elif pad_type == "valid":
            before = after = 0
        if output_shape is not None:
            after = whole - before - output_shape[2 + dim]
        cut = [-before, -after, *cut]
    out = F.pad(out, cut) if any(cut) else out
    return out if bias is None else out + bias.reshape(-1, *[1] * rank)


def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest element of each window."""
    steps = strides or (1,) * len(kernel_sizes)
    around = _window_padding(x, kernel_sizes, steps, pad_type, pad, ceil_mode)
    padded = _padded(x, around, -math.inf)
    return _of_rank(_LARGEST, x.dim() - 2)(padded, kernel_sizes, steps)  # type: ignore[no-any-return]


def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """The mean of each window; padding counts as zeros, or is not counted.

    With ``ceil_mode`` a window may reach beyond the padding; those elements are never counted.
    """
    steps = strides or (1,) * len(kernel_sizes)
    around = _window_padding(x, kernel_sizes, steps, pad_type, pad, ceil_mode)
    inner = _padding(x.shape[2:], kernel_sizes, steps, pad_type, pad)
    pool = _of_rank(_AVERAGE, x.dim() - 2)
    means: Tensor = pool(_padded(x, around, 0.0), kernel_sizes, steps)
    counted = inner if exclude_padding_from_average else [(0, 0)] * len(inner)
    left_out = [
        (c[0] + o[0] - i[0], c[1] + o[1] - i[1])
        for c, o, i in zip(counted, around, inner, strict=True)
    ]
    if not any(map(any, left_out)):
        return means
    sizes = [
        size + sum(whole) - sum(out)
        for size, whole, out in zip(x.shape[2:], around, left_out, strict=True)
    ]
    part: Tensor = pool(_padded(torch.ones(1, 1, *sizes), left_out, 0.0), kernel_sizes, steps)
    return means / part


def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The square root of the sum of squares of each window."""
    steps = strides or (1,) * len(kernel_sizes)
    around = _window_padding(x, kernel_sizes, steps, pad_type, pad, ceil_mode)
    pool = _of_rank(_AVERAGE, x.dim() - 2)
    means: Tensor = pool(_padded(x * x, around, 0.0), kernel_sizes, steps)
    return torch.sqrt(means * math.prod(kernel_sizes))


def _padding(
    sizes: Sequence[int],
    kernel: Sequence[int],
    steps: Sequence[int],
    pad_type: str,
    pad: Ints | None,
) -> list[tuple[int, int]]:
    """The numbers of padding elements before and after each spatial dimension."""
    if pad_type not in _PADS:
        raise _unknown_pad(pad_type)
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        flat = pad or (0,) * 2 * len(sizes)
        return [(flat[2 * dim], flat[2 * dim + 1]) for dim in range(len(sizes))]
    found = []
    for size, length, step in zip(sizes, kernel, steps, strict=True):
        total = max(0, (math.ceil(size / step) - 1) * step + length - size)
        before = total - total // 2 if pad_type == "same_lower" else total // 2
        found.append((before, total - before))
    return found


def _window_padding(
    x: Tensor,
    kernel: Sequence[int],
    steps: Sequence[int],
    pad_type: str,
    pad: Ints | None,
    ceil_mode: bool,
) -> list[tuple[int, int]]:
    """As `_padding`, plus the elements that the last window needs when sizes are rounded up."""
    around = _padding(x.shape[2:], kernel, steps, pad_type, pad)
    if not ceil_mode:
        return around
    found = []
    for size, (before, after), length, step in zip(x.shape[2:], around, kernel, steps, strict=True):
        count = -(-(size + before + after - length) // step) + 1
        if (count - 1) * step >= size + before and before + after > 0:
            count -= 1
        need = (count - 1) * step + length - size - before
        found.append((before, max(after, need)))
    return found


def _padded(x: Tensor, around: Sequence[tuple[int, int]], value: float) -> Tensor:
    if not any(map(any, around)):
        return x
    check_shape(
        [*x.shape[:2], *(size + sum(ends) for size, ends in zip(x.shape[2:], around, strict=True))]
    )
    return F.pad(x, [end for ends in reversed(around) for end in ends], value=value)


def _of_rank(functions: tuple[Any, ...], rank: int) -> Any:
    if not 1 <= rank <= 3:
        raise DeviceError(f"the input has {rank} spatial dimensions; 1 to 3 are allowed")
    return functions[rank - 1]


def _unknown_pad(pad_type: str) -> DeviceError:
    return DeviceError(f"there is no pad_type {pad_type}; there are {', '.join(_PADS)}")


OPS: Final[dict[str, Operation]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "l2_pool": l2_pool,
}
