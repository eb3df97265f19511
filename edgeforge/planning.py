"""From a recipe's name to a plan: what is imported, what a recipe's rules decide."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from edgeforge.errors import UsageError

if TYPE_CHECKING:
    from edgeforge.weights import CheckpointWeights
    from quant.formats import ScaleName
    from quant.plan import QuantPlan

AS_IS: Final = "as-is"
DEFAULT: Final = "int4"

PLANNED: Final = {
    AS_IS: "every weight as the checkpoint has it: the default for quantized checkpoints",
}
"""Recipes that look at the checkpoint, beside those of `quant.recipes`, which look at names."""


def scale_name(text: str) -> ScaleName:
    """What imported scales are kept in, as the command line names it.

    Raises:
        UsageError: neither of the two.
    """
    if text == "float16":
        return "float16"
    if text == "bfloat16":
        return "bfloat16"
    raise UsageError(f"--imported-scales {text} is not possible: take float16 or bfloat16")


def choose_plan(
    weights: CheckpointWeights, recipe: str | None, imported_scales: ScaleName
) -> QuantPlan:
    """The plan for a checkpoint; weights that it holds as integers always stay those integers.

    Args:
        weights: the checkpoint's.
        recipe: a name or a YAML file; None for `DEFAULT`, or for `AS_IS` where the checkpoint was
            quantized before.
        imported_scales: ``float16`` to keep imported scales exactly, ``bfloat16`` to round those
            that bfloat16 does not hold.

    Raises:
        QuantizationError: no such recipe, or one that does not suit the model.
    """
    from quant.plan import FLOAT32, IMPORTED, Assignment, QuantPlan
    from quant.recipes import find_recipe

    shapes = weights.shapes()
    name = recipe or (AS_IS if weights.imported else DEFAULT)
    if name == AS_IS:
        stored = weights.stored_formats()
        chosen = {
            weight: Assignment(FLOAT32 if len(shapes[weight]) == 1 else format, "cast")
            for weight, format in stored.items()
        }
        plan = QuantPlan(AS_IS, chosen)
    else:
        plan = find_recipe(name, PLANNED).plan(shapes, weights.roles())
    imported = {
        weight: Assignment(
            format if imported_scales == "float16" else replace(format, scale_dtype="bfloat16"),
            IMPORTED,
        )
        for weight, format in weights.imported.items()
    }
    plan = QuantPlan(plan.recipe, {**plan.weights, **imported})
    plan.check(shapes)
    return plan


def import_notes(weights: CheckpointWeights, plan: QuantPlan) -> tuple[str, ...]:
    """What a user must know of weights that were imported, one sentence each."""
    from quant.plan import IMPORTED

    imported = {n: a.format for n, a in plan.weights.items() if a.algorithm == IMPORTED}
    if weights.packing is None or not imported:
        return ()
    names = ", ".join(sorted({format.name for format in imported.values()}))
    others = sum(len(weights.shapes()[name]) > 1 for name in plan.weights.keys() - imported.keys())
    notes = [
        f"{len(imported)} weights are stored as the checkpoint has them ({weights.packing.method}, "
        f"{names}); FLOAT is the checkpoint's own integers times scales",
        f"the recipe {plan.recipe} decides about the other {others} matrices",
    ]
    rounded = sum(imported[name] != weights.imported[name] for name in imported)
    if rounded:
        notes.append(
            f"scales of {rounded} imported weights were rounded to bfloat16: relative_error says "
            f"by how much"
        )
    return tuple(notes)
