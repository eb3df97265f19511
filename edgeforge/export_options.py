"""`ExportOptions`: what a user asks of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.calibration.text import (
    CalibrationOptions,
)
from edgeforge.planning.budget import Budget
from exporters.options import TargetOptions
from quant.formats.formats import ScaleName

if TYPE_CHECKING:
    pass


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
