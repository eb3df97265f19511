"""The formats from which a mixed plan chooses: those that every target can store."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
"""The formats that a weight may get, if the targets can store them."""

LAST_RESORTS: Final = ("int2-g64", "lut2-gc16")
"""Further formats that a weight may get only if no plan without them fits the budget.

Plans are chosen by the sum of the costs of single weights. With so few bits, the weights together
cost more than that sum: when these formats were always offered, a plan of 3.15 bits for the demo
model's palettes became worse (KL 0.33, and 0.25 without them).
"""


def allowed_formats(
    shapes: Mapping[str, tuple[int, ...]],
    facts: ModelFacts,
    targets: Sequence[Target],
    options: TargetOptions,
    names: Sequence[str] = (*FORMATS, *LAST_RESORTS),
    signed: bool = True,
    kept: Collection[str] = (),
) -> dict[str, list[Assignment]]:
    """Returns, by matrix, the formats that fit it and that every target can store.

    Each format comes with its best algorithm that needs no calibration.

    Args:
        shapes: each weight's shape.
        facts: the model's facts, for the targets.
        targets: the targets to write.
        options: the targets' options; a limit on memory is checked only for the finished plan.
        names: names of the formats to try.
        signed: whether to allow scales below zero, where the targets can store them.
        kept: weights that are float32 whatever their shape, and get no formats: convolutions.

    Raises:
        ExportError: a target refuses the model whatever its formats are.
    """
    # Every profile of every target can store vectors in float32 and matrices in float16.
    matrices = [name for name, shape in shapes.items() if len(shape) > 1 and name not in kept]
    plain = dict.fromkeys(shapes, Assignment(FLOAT32, CAST))
    plain |= dict.fromkeys(matrices, Assignment(FloatFormat("float16"), CAST))
    free = replace(options, max_memory=None)
    for target in targets:
        target.check(QuantPlan("candidates", plain), shapes, facts, free.only(target.options))

    def holds(given: Mapping[str, Assignment]) -> bool:
        plan = QuantPlan("candidates", {**plain, **given})
        try:
            plan.check(shapes)
            for target in targets:
                target.check(plan, shapes, facts, free.only(target.options))
        except (QuantizationError, ExportError):
            return False
        return True

    allowed: dict[str, list[Assignment]] = {name: [] for name in matrices}
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
    """Returns whether a scale's sign matters: at 8 bits one more step makes no difference."""
    format = assignment.format
    return isinstance(format, IntFormat) and format.symmetric and format.bits <= 4


def _assign(format: str) -> Assignment:
    from quant.plans.algorithms import algorithms_for

    parsed = parse_format(format)
    return Assignment(parsed, algorithms_for(parsed)[0])
