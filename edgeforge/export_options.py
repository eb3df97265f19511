"""`ExportOptions`: what a user asks of an export, and `ExportRun`: what was decided from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.calibration.text import Calibration, CalibrationOptions
from edgeforge.errors import UsageError
from edgeforge.families.spec import ModelSpec
from edgeforge.model.model import Model
from edgeforge.planning.budget import Budget
from edgeforge.planning.choose import Planned, PlanRequest
from exporters.options import TargetOptions
from exporters.target import ModelFacts, Target
from quant.formats.formats import ScaleName

if TYPE_CHECKING:
    from edgeforge.model.low_rank import SeparateAdapter
    from edgeforge.model.rotated_weights import Rotated
    from quant.program.program import Program


@dataclass(frozen=True)
class ExportOptions:
    """What a user asks of an export.

    Attributes:
        recipe: a name from `quant.plans.recipes` or `edgeforge.planning.choose`, or a YAML file;
            None for the model's default (`edgeforge.planning.choose.default_recipe`).
        context: declared context in tokens; None for the model's own, at most 4096.
        force: whether to replace an existing output folder of which EdgeForge wrote every file.
        threads: threads for quantization; None for one per processor, at most four.
        target: the options that go to the targets.
        calibration: the text on which calibrated algorithms collect activations.
        resume: folder of the partial results of calibration; None for one in the cache.
        imported_scales: dtype in which the scales of imported weights are stored.
        budget: the budget of a mixed recipe.
        save_plan: file to which the plan is written as a recipe; None to write none.
        rotation: a name from `edgeforge.model.rotations`; None for the recipe's own, if it has one.
        calibrate: whether the default recipe may need a calibration text.
        separate_adapters: adapters that lie beside the weights, each ``DIR`` or ``DIR@weight``.
    """

    recipe: str | None = None
    context: int | None = None
    force: bool = False
    threads: int | None = None
    target: TargetOptions = field(default_factory=TargetOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    resume: Path | None = None
    imported_scales: ScaleName = "float16"
    budget: Budget = field(default_factory=Budget)
    save_plan: Path | None = None
    rotation: str | None = None
    calibrate: bool = True
    separate_adapters: tuple[str, ...] = ()

    def plan_request(
        self, targets: Sequence[Target], facts: ModelFacts, rotated: Rotated | None
    ) -> PlanRequest:
        """Returns the part of the options that decides the plan.

        Args:
            targets: the targets that must be able to store the plan.
            facts: the model's facts, for the targets.
            rotated: the rotated model; None where the weights are not rotated.
        """
        return PlanRequest(
            recipe=self.recipe,
            targets=targets,
            target_options=self.target,
            facts=facts,
            calibration=self.calibration,
            imported_scales=self.imported_scales,
            budget=self.budget,
            save_plan=self.save_plan,
            force=self.force,
            rotated=rotated,
            calibrate=self.calibrate,
        )


@dataclass(frozen=True)
class ExportRun:
    """One export after all decisions and before any weight is read.

    Attributes:
        model: the opened model; its weights are the rotated ones where a rotation was asked for.
        targets: the targets to write.
        options: what the user asked for.
        facts: the model's facts at the declared context.
        planned: the plan, with its notes and what was traced to make it.
        calibration: the text to collect activations on; None where nothing is calibrated.
        require_unchanged: refuses the export if a file that it reads has changed.
        adapters: adapters that lie beside the weights.
    """

    model: Model
    targets: Sequence[Target]
    options: ExportOptions
    facts: ModelFacts
    planned: Planned
    calibration: Calibration | None
    require_unchanged: Callable[[], None]
    adapters: Sequence[SeparateAdapter] = ()

    @property
    def program(self) -> Program | None:
        """The float program if the plan or a rotation already needed it, else None."""
        rotated = self.planned.rotated
        return self.planned.program or (None if rotated is None else rotated.program)

    @property
    def static_caches(self) -> bool:
        """Whether a target needs fixed cache scales, measured on the calibration text."""
        return any(has_static_caches(target, self.options.target) for target in self.targets)


def has_static_caches(target: Target, options: TargetOptions) -> bool:
    """Returns whether a target's cache scales are fixed when the artifact is written."""
    return options.kv_cache in target.static_caches


def check_drafts(spec: ModelSpec, options: TargetOptions) -> None:
    """Refuses a graph for drafts of a model from whose text no token can be taken back.

    Raises:
        UsageError: names the model's type.
    """
    if options.draft_positions is not None and not spec.can_rewind:
        raise UsageError(
            f"--draft-positions is not possible: layers of this {spec.model_type} model carry more "
            f"than a row for each position, so that a refused draft cannot be taken back"
        )


def check_caches(spec: ModelSpec, options: TargetOptions) -> None:
    """Refuses integer caches of a model that has no caches.

    Raises:
        UsageError: names the model's type.
    """
    if options.kv_cache == "int8" and not spec.attends:
        raise UsageError(
            f"--kv-cache int8 is not possible: no layer of this {spec.model_type} model keeps keys "
            f"and values, and its states stay float32"
        )


def scale_name(text: str) -> ScaleName:
    """Returns the dtype of imported scales from its name on the command line.

    Raises:
        UsageError: the name is neither ``float16`` nor ``bfloat16``.
    """
    if text == "float16":
        return "float16"
    if text == "bfloat16":
        return "bfloat16"
    raise UsageError(f"--imported-scales {text} is not possible: take float16 or bfloat16")
