"""Makes the plan of a recipe: the recipe's rules, and the weights that stay as imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeforge.calibration.text import QUICK_PARAMETERS, CalibrationOptions, CalibrationRun
from edgeforge.checkpoint.imported.method import DecodableMethod
from edgeforge.errors import UsageError
from edgeforge.planning.budget import MIXED, Budget
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.tokenizer import TOKENIZER
from exporters.options import TargetOptions
from quant.plans.algorithms import CAST

if TYPE_CHECKING:
    from edgeforge.model.checkpoint_weights import CheckpointWeights
    from edgeforge.model.model import Model
    from edgeforge.model.rotated_weights import Rotated
    from edgeforge.planning.advice import PlanCheck
    from exporters.target import ModelFacts, Target
    from quant.formats.formats import ScaleName
    from quant.plans.plan import Assignment, QuantPlan
    from quant.plans.rules import Recipe
    from quant.program.program import Program

AS_IS: Final = "as-is"
DEFAULT: Final = "int4"
QUICK_DEFAULT: Final = "int4-gptq"
"""The default for models that calibration takes less than a minute or so for."""

PLANNED: Final = {
    AS_IS: "every weight as the checkpoint has it; the default for quantized checkpoints",
    "mixed": "formats chosen weight by weight under a budget of bits, bytes or divergence",
    "mixed-gptq": "the formats of mixed; GPTQ chooses the integers on the calibration text",
}
"""Recipes that depend on the checkpoint; those of `quant.plans.recipes` depend on names only."""


@dataclass(frozen=True)
class PlanRequest:
    """All that decides a plan, beside the model.

    Attributes:
        recipe: a name or a YAML file; None for what `default_recipe` returns.
        targets: the targets that must be able to store the plan.
        target_options: the targets' options.
        facts: the model's facts, for the targets; only mixed recipes need them.
        calibration: the text on which mixed recipes measure formats.
        imported_scales: dtype in which the scales of imported weights are stored.
        budget: the budget of a mixed recipe.
        save_plan: file to which the plan is written as a recipe; None to write none.
        force: whether that file may be replaced by another plan.
        rotated: the rotated model; None where weights are not rotated.
        calibrate: whether the default may be a recipe that needs a calibration text.
    """

    recipe: str | None = None
    targets: Sequence[Target] = ()
    target_options: TargetOptions = field(default_factory=TargetOptions)
    facts: ModelFacts | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    imported_scales: ScaleName = "float16"
    budget: Budget = field(default_factory=Budget)
    save_plan: Path | None = None
    force: bool = False
    rotated: Rotated | None = None
    calibrate: bool = True


@dataclass(frozen=True)
class Planned:
    """A plan, with its notes and what was computed to make it.

    Attributes:
        plan: the format and algorithm of each weight.
        notes: notes for the manifest, one sentence each.
        warnings: what is not as a user expects, one sentence each.
        program: the float program, if making the plan needed it.
        rotated: the rotated model; None where weights are not rotated.
    """

    plan: QuantPlan
    notes: tuple[str, ...] = ()
    program: Program | None = None
    rotated: Rotated | None = None
    warnings: tuple[str, ...] = ()


def choose_plan(model: Model, request: PlanRequest, progress: Progress = no_progress) -> Planned:
    """Returns the plan for a checkpoint; weights that it holds as integers always stay as they are.

    Args:
        model: the opened model, or the rotated one where weights are rotated.
        request: the recipe and all else that decides the plan.
        progress: called as each stage advances.

    Raises:
        QuantizationError: there is no such recipe, or it does not suit the model.
        ExportError: a target cannot hold a weight's format.
        UsageError: the options contradict each other.
    """
    from edgeforge.planning.plan_file import check_plan_file, write_plan
    from edgeforge.planning.vocabulary import vocabulary_note
    from quant.plans.plan import QuantPlan

    shapes, rotated = model.weights.shapes(), request.rotated
    imported, warnings = _held(model, request)
    name = request.recipe or default_recipe(
        model, calibrate=request.calibrate, imported=bool(imported)
    )
    request.budget.check(name)
    check_plan_file(request.save_plan)
    planned = _plan_of_recipe(name, model, request, imported, progress)
    weights_of = {**planned.plan.weights, **imported}
    rotation = "" if rotated is None else rotated.record.name
    plan = QuantPlan(planned.plan.recipe, weights_of, rotation)
    # A target's refusal comes before any weight is read, with advice that all targets accept.
    _plan_check(model, request).run(plan)
    told = vocabulary_note(plan.recipe, {n: a.format.name for n, a in weights_of.items()}, shapes)
    notes = (*planned.notes, *([told] if told else []), *_import_notes(model.weights, plan))
    if rotated is not None:
        notes = (*notes, *rotated.notes(plan))
    if request.save_plan is not None:
        write_plan(plan, shapes, notes, request.save_plan, replace=request.force)
    return Planned(plan, notes, planned.program, rotated, (*warnings, *planned.warnings))


def _held(model: Model, request: PlanRequest) -> tuple[dict[str, Assignment], tuple[str, ...]]:
    """Returns the weights that stay integers as imported, and what a user must know about others.

    Integers that a target cannot hold are read as floats where the checkpoint's method allows it.
    """
    from exporters.errors import ExportError
    from quant.errors import QuantizationError

    imported = imported_assignments(model.weights, request.imported_scales)
    method, check = model.weights.method, _plan_check(model, request)
    if not isinstance(method, DecodableMethod) or check.facts is None:
        return imported, ()
    refused = {}
    for name, given in imported.items():
        try:
            check.run_alone(name, given)
        except (QuantizationError, ExportError) as error:
            refused[name] = error
    if not refused:
        return imported, ()
    reason = next(iter(refused.values()))
    forms = " and ".join(sorted({model.weights.forms()[name] for name in refused}))
    told = (
        f"{len(refused)} matrices that the checkpoint holds as {forms} are read as floats, and the "
        f"recipe decides about them: {getattr(reason, 'problem', None) or reason}"
    )
    return {name: given for name, given in imported.items() if name not in refused}, (told,)


def default_recipe(model: Model, *, calibrate: bool, imported: bool | None = None) -> str:
    """Returns the recipe of a model for which the user names none.

    A checkpoint that is quantized already stays as it is. A small model gets the formats of
    `DEFAULT` with integers chosen on the calibration text, where it has a tokenizer.

    Args:
        model: the opened model.
        calibrate: whether the recipe may need a calibration text.
        imported: whether weights stay integers as imported; None for what the checkpoint holds.
    """
    if imported or (imported is None and model.weights.imported):
        return AS_IS
    quick = model.spec.num_parameters < QUICK_PARAMETERS
    has_tokenizer = TOKENIZER in model.checkpoint.tokenizer_files
    return QUICK_DEFAULT if calibrate and quick and has_tokenizer else DEFAULT


def _plan_check(model: Model, request: PlanRequest) -> PlanCheck:
    from edgeforge.planning.advice import PlanCheck

    shapes = model.weights.shapes()
    return PlanCheck(shapes, request.targets, request.facts, request.target_options)


def _plan_of_recipe(
    name: str,
    model: Model,
    request: PlanRequest,
    imported: Mapping[str, Assignment],
    progress: Progress,
) -> Planned:
    """Returns a recipe's plan for every weight, before imported weights replace theirs."""
    from quant.plans.recipes import find_recipe

    if name in MIXED:
        return _mixed(model, name, request, imported, progress)
    if name != AS_IS:
        check = _plan_check(model, request)
        return Planned(plan_of(find_recipe(name, PLANNED), model.weights.roles(), check))
    if request.rotated is not None:
        raise UsageError(
            f"recipe {AS_IS} keeps every weight as the checkpoint has it, but a rotation changes "
            f"weights: leave one of the two out"
        )
    return Planned(as_is(model.weights, imported))


def plan_of(recipe: Recipe, roles: Mapping[str, str], check: PlanCheck) -> QuantPlan:
    """Returns a recipe's plan: that of the first variant that all targets hold, else its own.

    Args:
        recipe: the recipe.
        roles: each weight's role.
        check: asks the targets; it has the weights' shapes.

    Raises:
        QuantizationError: a rule does not suit the model.
    """
    for variant in recipe.variants() if check.facts is not None else ():
        plan = variant.plan(check.shapes, roles)
        if check.refusal(plan.weights) is None:
            return plan
    return recipe.plan(check.shapes, roles)


def as_is(
    weights: CheckpointWeights, imported: Mapping[str, Assignment] | None = None
) -> QuantPlan:
    """Returns the plan that keeps every matrix as the checkpoint has it, imported ones aside.

    Args:
        weights: the checkpoint's weights.
        imported: those that stay integers; None for all that the checkpoint holds so.
    """
    from quant.formats.formats import FloatFormat
    from quant.plans.plan import FLOAT32, Assignment, QuantPlan
    from quant.plans.rules import stays_float32

    shapes, roles, given = weights.shapes(), weights.roles(), weights.stored_formats().items()
    kept = {n: FLOAT32 if stays_float32(shapes[n], roles[n]) else format for n, format in given}
    if imported is not None:
        floats = weights.imported.keys() - imported.keys()
        kept = {n: FloatFormat("float16") if n in floats else f for n, f in kept.items()}
    return QuantPlan(AS_IS, {n: Assignment(f, CAST) for n, f in kept.items()})


def rotation_of(recipe: str | None, rotation: str | None) -> str | None:
    """Returns the name of the rotation that the option or the recipe's file asks for, or None.

    Args:
        recipe: a recipe's name or YAML file.
        rotation: the value of the option ``--rotation``.

    Raises:
        UsageError: there is no such rotation, or option and file contradict each other.
        QuantizationError: the file cannot be read.
    """
    from edgeforge.model.rotations import find_rotation
    from quant.plans.recipes import find_recipe

    written = None
    if recipe is not None and recipe.endswith((".yaml", ".yml")):
        written = find_recipe(recipe).rotation
    for name in (rotation, written):
        if name is not None:
            find_rotation(name)
    if rotation is not None and written not in (None, rotation):
        raise UsageError(
            f"--rotation {rotation} contradicts {recipe}, which says {written}: "
            f"leave the option out"
        )
    return rotation or written


def _mixed(
    model: Model,
    recipe: str,
    request: PlanRequest,
    imported: Mapping[str, Assignment],
    progress: Progress,
) -> Planned:
    """Returns a mixed recipe's plan under its budget."""
    from edgeforge.model.trace import trace
    from edgeforge.planning.candidates import allowed_formats
    from edgeforge.planning.mixed import mix, text_for
    from quant.formats.formats import FloatFormat
    from quant.plans.plan import FLOAT32, Assignment
    from quant.plans.rules import norm_matrix, stays_float32

    shapes, roles, facts = model.weights.shapes(), model.weights.roles(), request.facts
    assert facts is not None
    kept = [name for name, shape in shapes.items() if stays_float32(shape, roles[name])]
    options = request.target_options
    candidates = allowed_formats(shapes, facts, request.targets, options, kept=kept)
    fixed = dict.fromkeys(kept, Assignment(FLOAT32, CAST))
    fixed |= {name: norm_matrix() for name in candidates if roles[name] == "norm"}
    fixed.update(imported)
    without = [name for name, given in candidates.items() if not given and name not in fixed]
    fixed |= {name: Assignment(FloatFormat("float16"), CAST) for name in without}
    calibration = text_for(model, request.calibration, facts.context)
    progress("trace", 0, 0)
    rotated = request.rotated
    program = trace(model.spec, facts.context) if rotated is None else rotated.program
    calibration = CalibrationRun(model, calibration, lambda: program).sequences(progress)
    free = {name: given for name, given in candidates.items() if name not in fixed}
    mixed = mix(model, recipe, request.budget, free, fixed, calibration, program, progress)
    warnings = (*calibration.notes, *_of_floats(without, shapes))
    return Planned(mixed.plan, mixed.notes, program, warnings=warnings)


def _of_floats(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Returns what a user must know about the matrices that no format fits."""
    if not names:
        return ()
    count, columns = len(names), shapes[names[0]][1]
    matrices = "1 matrix stays" if count == 1 else f"{count} matrices stay"
    return (
        f"{matrices} in float16, for no format that all targets hold fits: {names[0]} has "
        f"{columns} input columns",
    )


def imported_assignments(
    weights: CheckpointWeights, scales: ScaleName = "float16"
) -> dict[str, Assignment]:
    """Returns the assignments of the weights that the checkpoint holds as integers."""
    from quant.plans.algorithms import IMPORTED
    from quant.plans.plan import Assignment

    return {
        name: Assignment(
            format if scales == "float16" else replace(format, scale_dtype="bfloat16"), IMPORTED
        )
        for name, format in weights.imported.items()
    }


def _import_notes(weights: CheckpointWeights, plan: QuantPlan) -> tuple[str, ...]:
    """Returns what a user must know about weights that were quantized before, one sentence each."""
    from quant.plans.algorithms import IMPORTED

    if weights.method is None:
        return ()
    imported = {n: a.format for n, a in plan.weights.items() if a.algorithm == IMPORTED}
    notes = []
    if imported:
        names = ", ".join(sorted({format.name for format in imported.values()}))
        others = plan.weights.keys() - imported.keys()
        count = sum(len(weights.shapes()[name]) > 1 for name in others)
        notes += [
            f"{len(imported)} weights are stored as the checkpoint has them "
            f"({weights.method.method}, {names}); FLOAT is the checkpoint's own integers times "
            f"scales",
            f"the recipe {plan.recipe} decides about the other {count} matrices",
        ]
    rounded = sum(imported[name] != weights.imported[name] for name in imported)
    if rounded:
        notes.append(
            f"scales of {rounded} imported weights were rounded to bfloat16: relative_error says "
            f"by how much"
        )
    decoded: dict[str, int] = {}
    for name, form in weights.forms().items():
        if name not in imported:
            decoded[form] = decoded.get(form, 0) + 1
    if decoded:
        listed = ", ".join(f"{count} from {form}" for form, count in sorted(decoded.items()))
        notes.append(
            f"the checkpoint's weights were quantized once already ({weights.method.method}): "
            f"{sum(decoded.values())} matrices were decoded to floats ({listed}), which are FLOAT "
            f"here, and an error beside it is that of the recipe alone"
        )
    return (*notes, *weights.decoding_notes())
