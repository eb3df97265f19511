"""Plans that benchmarks use in addition to those of the built-in recipes."""

import math
from collections.abc import Sequence

from edgeforge.families.facts import facts_of
from edgeforge.model.model import Model
from edgeforge.planning.budget import Budget
from edgeforge.planning.choose import PlanRequest, choose_plan
from exporters.registry import TARGETS
from quant.errors import QuantizationError
from quant.plans.plan import QuantPlan, matrix_shape
from quant.plans.recipes import find_recipe
from quant.plans.rules import Recipe, Rule


def uniform_plan(model: Model, name: str, format: str, algorithm: str | None) -> QuantPlan:
    """Returns a plan with one format and algorithm for every matrix.

    Raises:
        QuantizationError: there is no such format or algorithm, or it does not suit the model.
    """
    shapes = model.weights.shapes()
    plan = Recipe(name, "", (Rule("*", format, algorithm),)).plan(shapes, model.weights.roles())
    plan.check(shapes)
    return plan


def recipe_plan(model: Model, recipe: str, targets: Sequence[str] = ()) -> QuantPlan:
    """Returns a recipe's plan.

    Args:
        model: an opened model.
        recipe: a recipe's name.
        targets: those for which it is; none where the recipe's plan is the same for all.

    Raises:
        QuantizationError: the recipe does not suit the model.
        ExportError: a target cannot hold the formats.
    """
    if targets:
        facts = facts_of(model.spec, model.spec.max_context)
        request = PlanRequest(recipe, [TARGETS[name] for name in targets], facts=facts)
        return choose_plan(model, request).plan
    shapes = model.weights.shapes()
    plan = find_recipe(recipe).plan(shapes, model.weights.roles())
    plan.check(shapes)
    return plan


def mixed_plan(model: Model, recipe: str, nbytes: int, targets: Sequence[str]) -> QuantPlan:
    """Returns the plan of a mixed recipe that takes at most ``nbytes`` bytes, vectors included.

    The plan uses the formats of the first of the targets whose formats fit the budget.

    Raises:
        QuantizationError: the budget is too small for all targets.
    """
    facts = facts_of(model.spec, model.spec.max_context)

    def plan_for(target: str) -> QuantPlan:
        budget = Budget(max_size=nbytes)
        request = PlanRequest(recipe, [TARGETS[target]], facts=facts, budget=budget)
        return choose_plan(model, request).plan

    *others, last = targets
    for target in others:
        try:
            return plan_for(target)
        except QuantizationError:
            continue
    return plan_for(last)


def stored_bytes(model: Model, plan: QuantPlan, *, vectors: bool = True) -> int:
    """Returns the stored bytes of a plan's matrices, and of its vectors unless told otherwise."""
    shapes = model.weights.shapes()
    return sum(
        given.format.nbytes(*matrix_shape(shapes[name]))
        for name, given in plan.weights.items()
        if vectors or len(shapes[name]) > 1
    )


def parameters(model: Model, *, vectors: bool = True) -> int:
    """Returns the number of elements in a model's matrices, and in its vectors by default."""
    shapes = model.weights.shapes().values()
    return sum(math.prod(shape) for shape in shapes if vectors or len(shape) > 1)
