"""What a mixed plan may choose from: formats that every target holds, and how each is filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.target import ModelFacts, Target
from quant.errors import QuantizationError
from quant.formats.formats import FloatFormat, IntFormat, parse_format
from quant.plans.algorithms import CAST, SIGNED
from quant.plans.plan import FLOAT32, Assignment, QuantPlan

FORMATS: Final = (
    "int4-pc",
    "int4-g128",
    "int4-g64",
    "int4-g32",
    "int4-g128-asym",
    "int4-g64-asym",
    "int4-g32-asym",
    "lut3-gc16",
    "lut4-gc16",
    "lut6-gc16",
    "lut4-pt",
    "lut6-pt",
    "int8-pc",
    "int8-g32",
)
"""What a weight may become, where the targets hold it."""

LAST_RESORTS: Final = ("int2-g64", "lut2-gc16")
"""What it may become as well where the bytes suffice for nothing else.

So few bits cost more together than the sum of what they cost one by one, by which plans are chosen:
offered always, they made a plan of 3.15 bits for the demo model's palettes worse (KL 0.33, 0.25
without them).
"""


def allowed_formats(
    shapes: Mapping[str, tuple[int, ...]],
    facts: ModelFacts,
    targets: Sequence[Target],
    options: TargetOptions,
    names: Sequence[str] = (*FORMATS, *LAST_RESORTS),
    signed: bool = True,
) -> dict[str, list[Assignment]]:
    """By matrix, what fits it and every target can hold; each format with its best algorithm.

    Args:
        shapes: by weight.
        facts: for the targets.
        targets: that are to be written.
        options: of the targets; a bound on memory is left for the finished plan.
        names: of the formats.
        signed: whether scales below zero may be taken, where the targets hold them.
    """
    # Every profile of every target holds vectors in float32 and matrices in float16.
    plain = {
        name: Assignment(FLOAT32 if len(shape) == 1 else FloatFormat("float16"), CAST)
        for name, shape in shapes.items()
    }
    free = replace(options, max_memory=None)

    def holds(given: Mapping[str, Assignment]) -> bool:
        plan = QuantPlan("candidates", {**plain, **given})
        try:
            plan.check(shapes)
            for target in targets:
                target.check(plan, shapes, facts, free.only(target.options))
        except (QuantizationError, ExportError):
            return False
        return True

    allowed: dict[str, list[Assignment]] = {n: [] for n, s in shapes.items() if len(s) > 1}
    for name in names:
        given = _assign(name)
        ways = [given]
        if signed and _sign_matters(given):
            ways.insert(0, replace(given, algorithm=SIGNED))
        everywhere = next((way for way in ways if holds(dict.fromkeys(allowed, way))), None)
        for weight, found in allowed.items():
            way = everywhere or next((way for way in ways if holds({weight: way})), None)
            if way is not None:
                found.append(way)
    return allowed


def _sign_matters(assignment: Assignment) -> bool:
    """Whether a scale's sign matters: at 8 bits one step more is nothing."""
    format = assignment.format
    return isinstance(format, IntFormat) and format.symmetric and format.bits <= 4


def _assign(format: str) -> Assignment:
    from quant.plans.algorithms import algorithms_for

    parsed = parse_format(format)
    return Assignment(parsed, algorithms_for(parsed)[0])
