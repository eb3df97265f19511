"""Resizing and cropping of images."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_shape
from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.errors import DeviceError

_SAMPLING: Final = (
    "DEFAULT",
    "STRICT_ALIGN_CORNERS",
    "ALIGN_CORNERS",
    "OFFSET_CORNERS",
    "UNALIGN_CORNERS",
)


def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    """Scales the last two dimensions by repeating each pixel."""
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return resize_nearest_neighbor(x, height, width)


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Resizes the last two dimensions; each new pixel is the nearest old one."""
    check_shape([*x.shape[:-2], target_size_height, target_size_width])
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        place = torch.arange(size) * x.shape[axis] // size
        x = x.index_select(axis, place)
    return x


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """Scales the last two dimensions by bilinear interpolation."""
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    centres = not align_corners if half_pixel_centers is None else half_pixel_centers
    free = "UNALIGN_CORNERS" if centres else "DEFAULT"
    mode = "STRICT_ALIGN_CORNERS" if align_corners else free
    return resize_bilinear(x, height, width, mode)


def resize_bilinear(
    x: Tensor,
    target_size_height: int = 1,
    target_size_width: int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Resizes the last two dimensions by interpolation at points that the mode chooses."""
    if sampling_mode not in _SAMPLING:
        raise DeviceError(
            f"resize_bilinear has no sampling mode {sampling_mode}; it has {', '.join(_SAMPLING)}"
        )
    check_shape([*x.shape[:-2], target_size_height, target_size_width])
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = _interpolated(x, axis, _points(x.shape[axis], size, sampling_mode))
    return x


def crop(x: Tensor, crop_height: tuple[int, ...], crop_width: tuple[int, ...]) -> Tensor:
    """Cuts elements off the last two dimensions; each pair is the numbers before and after."""
    height, width = x.shape[-2:]
    return x[
        ...,
        crop_height[0] : height - crop_height[1],
        crop_width[0] : width - crop_width[1],
    ]


def _scaled(x: Tensor, height: float, width: float) -> tuple[int, int]:
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


def _points(size: int, count: int, mode: str) -> Tensor:
    """The positions of ``count`` new elements among ``size`` old ones: float64 ``[count]``."""
    index = torch.arange(count, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            points = index + ((size - 1) / 2 if mode == "ALIGN_CORNERS" else 0)
        else:
            points = index * (size - 1) / (count - 1)
    elif mode == "DEFAULT":
        points = index * size / count
    elif mode == "OFFSET_CORNERS":
        points = (index + 0.5) * max(1, size - 1) / count
    else:
        points = (index + 0.5) * size / count - 0.5
    return points.clamp(0, size - 1)


def _interpolated(x: Tensor, axis: int, points: Tensor) -> Tensor:
    low = points.floor().to(torch.int64)
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    part = (points - low).to(x.dtype)
    if axis == -2:
        part = part.unsqueeze(-1)
    first, second = x.index_select(axis, low), x.index_select(axis, high)
    return first + (second - first) * part


OPS: Final[dict[str, Operation]] = {
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "resize_bilinear": resize_bilinear,
    "crop": crop,
}
