"""Checks of options, palettes and rounded activations that several targets use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from exporters.errors import ExportError, WeightRefused
from exporters.options import TargetOptions
from quant.formats.activations import NONE, TENSOR, TOKEN, Activation
from quant.formats.formats import PaletteFormat
from quant.plans.plan import QuantPlan

if TYPE_CHECKING:
    from exporters.target import Target

ACTIVATIONS: Final = ("auto", "int8", "float")
"""The values of the option ``activations``."""
MOST_DRAFT_POSITIONS: Final = 64
"""The largest value of the option ``draft_positions``: a draft is a few tokens."""


def check_options(options: TargetOptions, targets: Iterable[Target]) -> None:
    """Refuses an option that no target takes, and a value that a target does not know.

    An option that only some of the targets take applies to those; `not_applied` tells the user
    about the others.

    Raises:
        ExportError: names the option and the values that are allowed.
    """
    chosen = list(targets)
    for name, value in options.given().items():
        flag = "--" + name.replace("_", "-")
        takers = [target for target in chosen if name in target.options]
        if not takers:
            named = " and ".join(
                target.name + "".join(f", {reason}," for reason in _reason(target, name))
                for target in chosen
            )
            has = "has" if len(chosen) == 1 else "have"
            raise ExportError(f"{named} {has} no option {flag}: leave it out")
        for target in takers:
            allowed = target.options[name]
            if allowed and value not in allowed:
                raise ExportError(
                    f"{flag} {value} is not known to {target.name}: take {' or '.join(allowed)}"
                )


def not_applied(options: TargetOptions, target: Target) -> tuple[str, ...]:
    """The given options that this target cannot take although others do, one sentence each."""
    return tuple(
        f"--{name.replace('_', '-')} {value} does not apply to {target.name}, {reason}"
        for name, value in options.given().items()
        for reason in _reason(target, name)
    )


def _reason(target: Target, name: str) -> tuple[str, ...]:
    """Why a target cannot take an option that others take; empty when it states no reason."""
    return (target.passed_over[name],) if name in target.passed_over else ()


def check_draft_positions(options: TargetOptions, context: int) -> None:
    """Refuses a number of draft positions that no graph is written for.

    Args:
        options: the options that the user gave.
        context: the declared context, in tokens.

    Raises:
        ExportError: says which numbers are possible.
    """
    positions, most = options.draft_positions, min(MOST_DRAFT_POSITIONS, context)
    if positions is not None and not 2 <= positions <= most:
        raise ExportError(
            f"--draft-positions {positions} is not possible: a graph for drafts gives the logits "
            f"of 2 to {most} positions, and 1 is what every artifact gives"
        )


def refuse_palettes(plan: QuantPlan, runtime: str) -> None:
    """Refuses a plan that stores a weight as a palette.

    Args:
        plan: the format of every weight.
        runtime: the runtime's name, for the message.

    Raises:
        ExportError: names the weight and the format to use instead.
    """
    for weight, assignment in plan.weights.items():
        if isinstance(assignment.format, PaletteFormat):
            use = "int4-g32" if assignment.format.bits <= 4 else "int8-pc"
            raise WeightRefused(
                f"{weight} is to be {assignment.format.name}; {runtime} has no kernel for "
                f"palettes, which only Core ML reads",
                f"use {use}",
            )


def refuse_activation(plan: QuantPlan, activation: Activation, why: str, use: str) -> None:
    """Refuses a plan in which a weight has an activation rounding that the runtime lacks.

    Args:
        plan: the activation rounding of every weight.
        activation: the rounding that is not possible.
        why: what the runtime lacks, for the message.
        use: what to use instead, for the message.

    Raises:
        ExportError: a weight of the plan has this rounding.
    """
    for weight, assignment in plan.weights.items():
        if assignment.activation == activation:
            raise WeightRefused(
                f"{weight} is to be multiplied by activations rounded to {activation}; {why}",
                f"use {use}",
            )


def check_float_activations(plan: QuantPlan, options: TargetOptions) -> None:
    """Refuses float activations for a plan that rounds activations itself.

    Raises:
        ExportError: ``activations`` is ``float``, and a weight of the plan rounds its activations.
    """
    rounded = [name for name, given in plan.weights.items() if given.activation != NONE]
    if options.activations == "float" and rounded:
        raise ExportError(
            f"--activations float is not possible with a recipe that rounds activations itself, "
            f"as this one does for {rounded[0]}: leave the option out, or take a recipe that "
            f"rounds only weights, such as int8"
        )


def activation_notes(plan: QuantPlan) -> tuple[str, ...]:
    """Notes for the user about the activations that the plan rounds, one sentence each."""
    given = [assignment.activation for assignment in plan.weights.values()]
    words = {
        TOKEN: "products of {} matrices round each token's activations to 8 bits, as QUANTIZED "
        "does",
        TENSOR: "products of {} matrices round activations to 8 bits with one scale for each "
        "matrix, as QUANTIZED does: the scale with the least squared error on the calibration text",
    }
    return tuple(text.format(given.count(key)) for key, text in words.items() if key in given)
