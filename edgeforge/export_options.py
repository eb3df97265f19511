"""`ExportOptions`: what a user asks of an export, and `ExportRun`: what was decided from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.calibration.text import Calibration, CalibrationOptions
from edgeforge.errors import UsageError
from edgeforge.model.model import Model
from edgeforge.planning.budget import Budget
from edgeforge.planning.choose import Planned, PlanRequest
from exporters.options import TargetOptions
from exporters.target import ModelFacts, Target
from quant.formats.formats import ScaleName

if TYPE_CHECKING:
    from edgeforge.model.rotated_weights import Rotated
    from quant.program.program import Program


@dataclass(frozen=True)
class ExportOptions:
    """What a user asks of an export.

    Attributes:
        recipe: a name of `quant.plans.recipes` or `edgeforge.planning.choose`, or a YAML file; None
            for the checkpoint's natural one.
        context: declared context in tokens; None for the model's own, 4096 at most.
        force: replace an existing output folder.
        threads: for quantization; None for one per processor, four at most.
        target: what targets are asked beyond the recipe.
        calibration: the text that calibrated algorithms look at activations on.
        resume: folder of the partial results of calibration; None for one in the cache.
        imported_scales: what scales of imported weights are kept in.
        budget: of a mixed recipe.
        save_plan: file that the plan is written to as a recipe.
        rotation: a name of `edgeforge.model.rotations`; None for the recipe's own, if it has one.
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

    def plan_request(
        self, targets: Sequence[Target], facts: ModelFacts, rotated: Rotated | None
    ) -> PlanRequest:
        """The part of the options that a plan is chosen by.

        Args:
            targets: that must hold the plan.
            facts: of the model, for the targets.
            rotated: the rotated model, where the weights are rotated.
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
            rotated=rotated,
        )


@dataclass(frozen=True)
class ExportRun:
    """One export, when everything is decided and no weight has been read yet.

    Attributes:
        model: opened; its weights are the rotated ones where a rotation was asked for.
        targets: what to write.
        options: what the user asked for.
        facts: of the model at the declared context.
        planned: the plan, and what came of making it.
        calibration: the text to look at activations on; None where nothing looks at any.
    """

    model: Model
    targets: Sequence[Target]
    options: ExportOptions
    facts: ModelFacts
    planned: Planned
    calibration: Calibration | None

    @property
    def program(self) -> Program | None:
        """The float program, where the plan or a rotation needed it already."""
        rotated = self.planned.rotated
        return self.planned.program or (None if rotated is None else rotated.program)

    @property
    def static_caches(self) -> bool:
        """Whether a target needs the scales of its caches from the calibration text."""
        return any(has_static_caches(target, self.options.target) for target in self.targets)


def has_static_caches(target: Target, options: TargetOptions) -> bool:
    """Whether the scales of a target's caches are fixed when the artifact is written."""
    return options.kv_cache in target.static_caches


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
