"""Which weight formats a package can hold, by profile and generation of operators."""

from __future__ import annotations

from exporters.errors import ExportError
from exporters.options import TargetOptions
from quant.formats import FloatFormat, IntFormat
from quant.plan import QuantPlan


def check_formats(plan: QuantPlan, options: TargetOptions) -> None:
    """Refuses weight formats.

    Raises:
        ExportError: says which weight, and what to use instead.
    """
    for weight, assignment in plan.weights.items():
        format = assignment.format
        if options.profile == "ane":
            _check_ane(weight, format)
        if options.opset == "ios17":
            _check_ios17(weight, format)


def _check_ane(weight: str, format: object) -> None:
    if isinstance(format, IntFormat) and format.group_size is not None:
        raise ExportError(
            f"{weight} is to be {format.name}; the Neural Engine wants one scale a row or a "
            f"palette, not blocks: use int{format.bits}-pc, or --profile gpu"
        )


def _check_ios17(weight: str, format: object) -> None:
    if isinstance(format, FloatFormat):
        return
    if isinstance(format, IntFormat) and format == IntFormat(8, None):
        return
    name = getattr(format, "name", str(format))
    raise ExportError(
        f"{weight} is to be {name}; iOS 17 holds integers of 8 bits with one scale a row only: "
        f"use int8-pc or fp16, or --opset ios18"
    )
