"""Gives a plan's 4-bit weights the finest grid that all targets hold, at nearly the same bytes.

Four-bit codes go from -8 to 7. With a positive scale the negative side has one step more than the
other, whichever side needs it; scales of either sign give it to the side with the largest weight,
at no cost in bytes. A zero point does more and costs 4 bits a group. Not every runtime holds them.
"""

from __future__ import annotations

from dataclasses import replace

from edgeforge.planning.advice import PlanCheck
from quant.formats.formats import IntFormat
from quant.plans.algorithms import SIGNED_BY_POSITIVE
from quant.plans.plan import Assignment, QuantPlan


def with_finer_grids(plan: QuantPlan, check: PlanCheck) -> QuantPlan:
    """Returns the plan with scales of either sign, or else zero points, if all targets hold them.

    The plan stays as it is where a target refuses both.

    Args:
        plan: a recipe's plan.
        check: asks the targets.
    """
    weights = dict(plan.weights)
    coarse = {name: given for name, given in weights.items() if _is_coarse(given)}
    signed = {
        name: replace(given, algorithm=SIGNED_BY_POSITIVE[given.algorithm])
        for name, given in coarse.items()
        if given.algorithm in SIGNED_BY_POSITIVE
    }
    if signed.keys() == coarse.keys() and check.refusal(signed) is None:
        return replace(plan, weights={**weights, **signed})
    pointed = {name: _with_zero_points(given) for name, given in coarse.items()}
    if check.refusal(pointed) is None:
        return replace(plan, weights={**weights, **pointed})
    return plan


def _is_coarse(given: Assignment) -> bool:
    format = given.format
    return isinstance(format, IntFormat) and format.symmetric and format.bits <= 4


def _with_zero_points(given: Assignment) -> Assignment:
    assert isinstance(given.format, IntFormat)
    return replace(given, format=replace(given.format, symmetric=False))
