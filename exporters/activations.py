"""For targets whose runtimes cannot round activations in each of the ways that a plan may ask."""

from __future__ import annotations

from exporters.errors import ExportError
from quant.activations import TENSOR, TOKEN, Activation
from quant.plan import QuantPlan


def refuse_activation(plan: QuantPlan, activation: Activation, why: str, use: str) -> None:
    """Refuses a plan that rounds activations in one way.

    Args:
        plan: activations by weight.
        activation: that is not possible.
        why: what the runtime lacks.
        use: what to use instead.

    Raises:
        ExportError: there is such a weight.
    """
    for weight, assignment in plan.weights.items():
        if assignment.activation == activation:
            raise ExportError(
                f"{weight} is to be multiplied by activations rounded to {activation}; {why}: "
                f"use {use}"
            )


def activation_notes(plan: QuantPlan) -> tuple[str, ...]:
    """What a user must know of activations that the plan rounds, one sentence each."""
    given = [assignment.activation for assignment in plan.weights.values()]
    words = {
        TOKEN: "products of {} matrices round each token's activations to 8 bits, as QUANTIZED "
        "does",
        TENSOR: "products of {} matrices round activations to 8 bits by one scale each, as "
        "QUANTIZED does: the scale of least squared error on the calibration text",
    }
    return tuple(text.format(given.count(key)) for key, text in words.items() if key in given)
