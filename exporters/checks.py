"""Checks that targets share: of options, palettes and rounded activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from exporters.errors import ExportError
from exporters.options import TargetOptions
from quant.formats.activations import TENSOR, TOKEN, Activation
from quant.formats.formats import PaletteFormat
from quant.plans.plan import QuantPlan

if TYPE_CHECKING:
    from exporters.target import Target


def check_options(options: TargetOptions, targets: Iterable[Target]) -> None:
    """Refuses an option that none of the targets takes, and a value that its target does not know.

    An option that one of several targets takes applies to that one; see `not_applied`.

    Raises:
        ExportError: says which, and what is allowed.
    """
    chosen = list(targets)
    for name, value in options.given().items():
        flag = "--" + name.replace("_", "-")
        takers = [target for target in chosen if name in target.options]
        if not takers:
            named = " and ".join(
                ", ".join((target.name, *_reason(target, name))) for target in chosen
            )
            raise ExportError(f"{flag} means nothing to {named}: leave it out")
        for target in takers:
            allowed = target.options[name]
            if allowed and value not in allowed:
                raise ExportError(
                    f"{flag} {value} is not known to {target.name}: take {' or '.join(allowed)}"
                )


def not_applied(options: TargetOptions, target: Target) -> tuple[str, ...]:
    """What was asked and a target cannot do though another beside it can, one sentence each."""
    return tuple(
        f"--{name.replace('_', '-')} {value} does not apply to {target.name}, {reason}"
        for name, value in options.given().items()
        for reason in _reason(target, name)
    )


def _reason(target: Target, name: str) -> tuple[str, ...]:
    """Why a target cannot take an option that others take, if there is a reason to tell."""
    return (target.passed_over[name],) if name in target.passed_over else ()


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
