"""Which known mixtures of experts fit on a phone where the one that was asked for does not."""

from __future__ import annotations

from collections.abc import Iterator

from edgeforge.families.facts import facts_of
from edgeforge.families.registry import read_spec
from edgeforge.forecast.limits import AppMemory
from edgeforge.forecast.sized_model import SizedModel
from edgeforge.planning.advice import PlanCheck
from edgeforge.planning.choose import DEFAULT, plan_of
from edgeforge.synth.presets import PRESETS
from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.target import Target
from quant.errors import QuantizationError
from quant.plans.recipes import find_recipe


def fitting_mixtures(
    target: Target, options: TargetOptions, app: AppMemory, context: int
) -> tuple[str, ...]:
    """Returns the released mixtures that fit with the default recipe's formats.

    Args:
        target: the target.
        options: the options of all targets.
        app: the memory that an app may take on the phone.
        context: declared context in tokens.
    """
    return tuple(name for name, size in _sizes(target, options, context) if _fits(app, size))


def _fits(app: AppMemory, size: int) -> bool:
    return app.verdict(size) in ("yes", "entitled")


def _sizes(target: Target, options: TargetOptions, context: int) -> Iterator[tuple[str, int]]:
    own = options.only(target.options)
    for name, preset in PRESETS.items():
        if name.startswith("tiny-"):
            continue
        model = SizedModel(name, read_spec(preset.config))
        if not model.spec.mixture:
            continue
        facts = facts_of(model.spec, min(context, model.spec.max_context))
        check = PlanCheck(model.shapes(), [target], facts, own)
        try:
            plan = plan_of(find_recipe(DEFAULT), model.roles(), check)
            target.check(plan, check.shapes, facts, own)
        except (QuantizationError, ExportError):
            continue
        yield name, target.footprint(plan, check.shapes, facts, own).total(facts.context)
