"""From a recipe's name to a plan: what is imported, what a recipe's rules decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from edgeforge.errors import UsageError

if TYPE_CHECKING:
    from edgeforge.export_options import ExportOptions
    from edgeforge.model.checkpoint_weights import CheckpointWeights
    from edgeforge.model.model import Model
    from edgeforge.model.rotated_weights import Rotated
    from exporters.target import ModelFacts, Target
    from quant.formats.formats import ScaleName
    from quant.plans.plan import Assignment, QuantPlan
    from quant.program.program import Program

AS_IS: Final = "as-is"
DEFAULT: Final = "int4"

PLANNED: Final = {
    AS_IS: "every weight as the checkpoint has it: the default for quantized checkpoints",
    "mixed": "formats chosen weight by weight under a budget of bits, bytes or divergence",
    "mixed-gptq": "the formats of mixed, integers chosen by GPTQ on the calibration text",
}
"""Recipes that look at the checkpoint; those of `quant.plans.recipes` look at names alone."""


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


@dataclass(frozen=True)
class Planned:
    """A plan and what came of making it.

    Attributes:
        plan: by weight.
        notes: for the manifest, one sentence each.
        program: the float program, where making the plan needed it.
        rotation: what a manifest keeps of the rotation of the weights, empty for none.
    """

    plan: QuantPlan
    notes: tuple[str, ...] = ()
    program: Program | None = None
    rotation: Mapping[str, object] = field(default_factory=dict)


def choose_plan(
    model: Model,
    options: ExportOptions,
    targets: Sequence[Target],
    facts: ModelFacts,
    progress: Callable[[str, int, int], None] = lambda stage, done, size: None,
    rotated: Rotated | None = None,
) -> Planned:
    """The plan for a checkpoint; weights that it holds as integers always stay those integers.

    Args:
        model: opened.
        options: the recipe: a name or a YAML file; None for `DEFAULT`, or for `AS_IS` where the
            checkpoint was quantized before. And what goes with it.
        targets: that must hold it.
        facts: for the targets.
        progress: told of each stage.
        rotated: what ``model`` comes from, where its weights are rotated.

    Raises:
        QuantizationError: no such recipe, or one that does not suit the model.
        UsageError: options that do not go together.
    """
    from edgeforge.planning.budget import MIXED
    from edgeforge.planning.plan_file import check_plan_file, write_plan
    from quant.plans.plan import FLOAT32, Assignment, QuantPlan
    from quant.plans.recipes import find_recipe

    weights = model.weights
    shapes, imported = weights.shapes(), _imported(weights, options.imported_scales)
    name = options.recipe or (AS_IS if imported else DEFAULT)
    options.budget.check(name)
    check_plan_file(options.save_plan)
    if name in MIXED:
        planned = _mixed(model, name, options, targets, facts, imported, progress, rotated)
    elif name == AS_IS:
        if rotated is not None:
            raise UsageError(
                f"recipe {AS_IS} keeps every weight as the checkpoint has it, and a rotation "
                f"changes them: leave one of the two out"
            )
        given = weights.stored_formats().items()
        kept = {n: FLOAT32 if len(shapes[n]) == 1 else format for n, format in given}
        planned = Planned(QuantPlan(AS_IS, {n: Assignment(f, "cast") for n, f in kept.items()}))
    else:
        planned = Planned(find_recipe(name, PLANNED).plan(shapes, weights.roles()))
    rotation = {} if rotated is None else rotated.record
    weights_of = {**planned.plan.weights, **imported}
    plan = QuantPlan(planned.plan.recipe, weights_of, str(rotation.get("name", "")))
    plan.check(shapes)
    notes = (*planned.notes, *_import_notes(weights, plan))
    if rotated is not None:
        notes = (*notes, *rotated.notes(plan))
    if options.save_plan is not None:
        write_plan(plan, shapes, notes, options.save_plan)
    return Planned(plan, notes, planned.program, rotation)


def rotation_of(options: ExportOptions) -> str | None:
    """The rotation that is asked for: by the option, or by a file of rules.

    Raises:
        UsageError: there is no such rotation, or the two contradict each other.
        QuantizationError: the file cannot be read.
    """
    from edgeforge.model.rotations import find_rotation
    from quant.plans.recipes import find_recipe

    written = None
    if options.recipe is not None and options.recipe.endswith((".yaml", ".yml")):
        written = find_recipe(options.recipe).rotation
    for name in (options.rotation, written):
        if name is not None:
            find_rotation(name)
    if options.rotation is not None and written not in (None, options.rotation):
        raise UsageError(
            f"--rotation {options.rotation} contradicts {options.recipe}, which says {written}: "
            f"leave the option out"
        )
    return options.rotation or written


def _mixed(
    model: Model,
    recipe: str,
    options: ExportOptions,
    targets: Sequence[Target],
    facts: ModelFacts,
    imported: Mapping[str, Assignment],
    progress: Callable[[str, int, int], None],
    rotated: Rotated | None,
) -> Planned:
    """A plan under a budget."""
    from edgeforge.model.trace import trace
    from edgeforge.planning.budget import MIXED
    from edgeforge.planning.candidates import allowed_formats
    from edgeforge.planning.mixed import mix, text_for
    from quant.plans.plan import FLOAT32, Assignment
    from quant.plans.recipes import norm_matrix

    shapes = model.weights.shapes()
    candidates = allowed_formats(
        shapes, facts, targets, options.target, signed=MIXED[recipe] is None
    )
    fixed = {n: Assignment(FLOAT32, "cast") for n, shape in shapes.items() if len(shape) == 1}
    roles = model.weights.roles()
    fixed |= {name: norm_matrix() for name in candidates if roles[name] == "norm"}
    fixed.update(imported)
    calibration = text_for(model, options.calibration, facts.context)
    progress("trace", 0, 0)
    program = trace(model.spec, facts.context) if rotated is None else rotated.program
    free = {name: given for name, given in candidates.items() if name not in fixed}
    mixed = mix(model, recipe, options.budget, free, fixed, calibration, program, progress)
    return Planned(mixed.plan, mixed.notes, program)


def _imported(weights: CheckpointWeights, scales: ScaleName) -> dict[str, Assignment]:
    """Assignments of the weights that the checkpoint holds as integers."""
    from quant.plans.algorithms import IMPORTED
    from quant.plans.plan import Assignment

    return {
        name: Assignment(
            format if scales == "float16" else replace(format, scale_dtype="bfloat16"), IMPORTED
        )
        for name, format in weights.imported.items()
    }


def _import_notes(weights: CheckpointWeights, plan: QuantPlan) -> tuple[str, ...]:
    """What a user must know of weights that were imported, one sentence each."""
    from quant.plans.algorithms import IMPORTED

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
