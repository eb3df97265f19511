"""Refuses scales that came from elsewhere, or have a sign, for runtimes that hold neither."""

from __future__ import annotations

from exporters.errors import ExportError
from quant.formats import IntFormat
from quant.plan import SIGNED, QuantPlan


def refuse_float16_scales(plan: QuantPlan, runtime: str) -> None:
    """Refuses float16 scales, which checkpoints bring that were quantized elsewhere.

    Args:
        plan: by weight.
        runtime: whose files these scales would go into.

    Raises:
        ExportError: names the first such weight and the option that rounds.
    """
    for weight, assignment in plan.weights.items():
        format = assignment.format
        if isinstance(format, IntFormat) and format.scale_dtype != "bfloat16":
            raise ExportError(
                f"{weight} is {format.name}; for {runtime} scales are written as bfloat16: round "
                f"them with --imported-scales bfloat16, which keeps the integers and changes no "
                f"scale by more than 0.2 %"
            )


def refuse_signed_scales(plan: QuantPlan, runtime: str) -> None:
    """Refuses scales below zero.

    Args:
        plan: by weight.
        runtime: that takes none.

    Raises:
        ExportError: names the first such weight.
    """
    for weight, assignment in plan.weights.items():
        if assignment.algorithm == SIGNED:
            raise ExportError(
                f"{weight} is to be filled by {SIGNED}; {runtime} takes no scales below zero: use "
                f"rtn"
            )
