"""For targets whose runtimes have no kernel that looks weights up in a table."""

from __future__ import annotations

from exporters.errors import ExportError
from quant.formats import PaletteFormat
from quant.plan import QuantPlan


def refuse_palettes(plan: QuantPlan, runtime: str) -> None:
    """Refuses a plan with a palette in it.

    Args:
        plan: formats by weight.
        runtime: the name to use in the message.

    Raises:
        ExportError: there is one; with what to use.
    """
    for weight, assignment in plan.weights.items():
        if isinstance(assignment.format, PaletteFormat):
            use = "int4-g32" if assignment.format.bits <= 4 else "int8-pc"
            raise ExportError(
                f"{weight} is to be {assignment.format.name}; {runtime} has no kernel for "
                f"palettes, which Core ML alone reads: use {use}"
            )
