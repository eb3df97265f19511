"""Checks which weight formats a package can hold, by profile and generation of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from exporters.checks import refuse_activation
from exporters.coreml.names import FLOAT, identifier
from exporters.errors import WeightRefused
from exporters.options import TargetOptions
from quant.formats.activations import TOKEN
from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, WeightFormat
from quant.plans.algorithms import POSITIVE
from quant.plans.plan import QuantPlan

_OF_IOS17: Final = IntFormat(8, None)


def check_formats(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], options: TargetOptions
) -> None:
    """Refuses weight formats that Core ML, the profile's processor or the opset cannot hold.

    Args:
        plan: the format and the algorithm of every weight.
        shapes: the shape of every weight; vectors, convolutions and routers are always float.
        options: the target's options, of which the profile and the opset are read.

    Raises:
        ExportError: names the weight, and what to use instead.
    """
    refuse_activation(
        plan,
        TOKEN,
        why="Core ML's quantize takes constant scales only",
        use="activation int8-tensor, as recipe w8a8-static does",
    )
    for weight, assignment in plan.weights.items():
        format = assignment.format
        identifier(weight)
        if len(shapes[weight]) == 1 or weight.endswith(FLOAT):
            continue
        if isinstance(format, IntFormat) and format.bits not in (4, 8):
            palette = next(bits for bits in (2, 3, 6, 8) if bits >= format.bits)
            raise WeightRefused(
                f"{weight} is to be {format.name}; Core ML holds integers of 4 and 8 bits, and "
                f"other numbers of bits as palettes",
                f"use lut{palette}-gc16",
            )
        if assignment.algorithm in POSITIVE:
            raise WeightRefused(
                f"{weight} is to be filled by {assignment.algorithm}, whose scales may be below "
                f"zero; Core ML's own tools write no such scales, so that no device is known to "
                f"read them",
                f"use {POSITIVE[assignment.algorithm]}, or a palette such as lut4-gc16",
            )
        if options.profile == "ane":
            _check_ane(weight, format)
        if options.opset == "ios17":
            _check_ios17(weight, format)


def _check_ane(weight: str, format: WeightFormat) -> None:
    if isinstance(format, FloatFormat) and format.dtype != "float16":
        raise WeightRefused(
            f"{weight} is to be {format.name}; the Neural Engine computes in float16",
            "use fp16, or --profile gpu",
        )
    if isinstance(format, IntFormat) and format.group_size is not None:
        raise WeightRefused(
            f"{weight} is to be {format.name}; the Neural Engine takes one scale a row or a "
            f"palette, not groups",
            f"use lut{format.bits}-gc16 or int{format.bits}-pc, or --profile gpu",
        )


def _check_ios17(weight: str, format: WeightFormat) -> None:
    if isinstance(format, FloatFormat):
        return
    if isinstance(format, IntFormat) and replace(format, scale_dtype="bfloat16") == _OF_IOS17:
        return
    if isinstance(format, PaletteFormat):
        if format.rows_per_group is None:
            return
        raise WeightRefused(
            f"{weight} is to be {format.name}; iOS 17 has one table for a whole matrix",
            f"use lut{format.bits}-pt, or --opset ios18",
        )
    raise WeightRefused(
        f"{weight} is to be {format.name}; the only integers that iOS 17 holds have 8 bits and one "
        f"scale a row",
        "use int8-pc, lut4-pt or fp16, or --opset ios18",
    )
