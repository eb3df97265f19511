"""Which weight formats a package can hold, by profile and generation of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from exporters.checks import refuse_activation
from exporters.coreml.names import identifier
from exporters.errors import ExportError
from exporters.options import TargetOptions
from quant.formats.activations import TOKEN
from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, WeightFormat
from quant.plans.algorithms import POSITIVE
from quant.plans.plan import QuantPlan

_OF_IOS17: Final = IntFormat(8, None)


def check_formats(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], options: TargetOptions
) -> None:
    """Refuses weight formats.

    Args:
        plan: formats and algorithms by weight.
        shapes: shape by weight; vectors are always float.
        options: profile and opset.

    Raises:
        ExportError: says which weight, and what to use instead.
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
        if len(shapes[weight]) == 1:
            continue
        if isinstance(format, IntFormat) and format.bits not in (4, 8):
            palette = next(bits for bits in (2, 3, 6, 8) if bits >= format.bits)
            raise ExportError(
                f"{weight} is to be {format.name}; Core ML holds integers of 4 and 8 bits, and of "
                f"others palettes: use lut{palette}-gc16"
            )
        if assignment.algorithm in POSITIVE:
            raise ExportError(
                f"{weight} is to be filled by {assignment.algorithm}; Core ML's own tools write no "
                f"scales below zero, so that no device is known to read them: use "
                f"{POSITIVE[assignment.algorithm]}, or a palette such as lut4-gc16"
            )
        if options.profile == "ane":
            _check_ane(weight, format)
        if options.opset == "ios17":
            _check_ios17(weight, format)


def _check_ane(weight: str, format: WeightFormat) -> None:
    if isinstance(format, FloatFormat) and format.dtype != "float16":
        raise ExportError(
            f"{weight} is to be {format.name}; the Neural Engine computes in float16: use fp16, or "
            f"--profile gpu"
        )
    if isinstance(format, IntFormat) and format.group_size is not None:
        raise ExportError(
            f"{weight} is to be {format.name}; the Neural Engine wants one scale a row or a "
            f"palette, not blocks: use lut{format.bits}-gc16 or int{format.bits}-pc, or "
            f"--profile gpu"
        )


def _check_ios17(weight: str, format: WeightFormat) -> None:
    if isinstance(format, FloatFormat):
        return
    if isinstance(format, IntFormat) and replace(format, scale_dtype="bfloat16") == _OF_IOS17:
        return
    if isinstance(format, PaletteFormat):
        if format.rows_per_group is None:
            return
        raise ExportError(
            f"{weight} is to be {format.name}; iOS 17 has one table for a whole matrix: use "
            f"lut{format.bits}-pt, or --opset ios18"
        )
    raise ExportError(
        f"{weight} is to be {format.name}; of integers, iOS 17 holds those of 8 bits with one "
        f"scale a row: use int8-pc, lut4-pt or fp16, or --opset ios18"
    )
