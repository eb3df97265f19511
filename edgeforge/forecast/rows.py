"""The recipes of one target on a phone: sizes, whether they fit, bounds of speed, the best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from edgeforge.errors import UsageError
from edgeforge.forecast.accuracy import measured_kl, measured_model
from edgeforge.forecast.fitting_mixtures import fitting_mixtures
from edgeforge.forecast.limits import HEADROOM, AppMemory
from edgeforge.forecast.mixtures import expert_bytes
from edgeforge.forecast.profiles import Phone
from edgeforge.forecast.sized_model import SizedModel
from edgeforge.forecast.speed import Work, work_of
from edgeforge.model.low_rank import refuse_rounded
from edgeforge.planning.advice import PlanCheck
from edgeforge.planning.choose import AS_IS, plan_of
from edgeforge.sizes import size_text
from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.target import ModelFacts, Target
from quant.errors import QuantizationError
from quant.plans.plan import QuantPlan, is_quantized
from quant.plans.recipes import find_recipe

if TYPE_CHECKING:
    from exporters.runtime_memory import Footprint

USEFUL_KL: Final = 1.0
"""A recipe whose KL was measured from here on has lost the model, in nats a token."""

RULE: Final = (
    f"best: of the quantized recipes that leave {HEADROOM:.0%} of the limit to the app, the one "
    f"whose KL was the least on {measured_model()} and below {USEFUL_KL:g}, else the one with the "
    f"most bits; a checkpoint that is quantized already stays as it is"
)


@dataclass(frozen=True)
class Row:
    """A recipe on a phone.

    Attributes:
        recipe: the recipe's name.
        bits: stored bits a weight, scales and norms included.
        formats: how many weights have each format.
        footprint: the memory that the runtime takes, by part.
        stored: bytes of the weights in the artifact's files.
        weights: bytes of the weights in memory.
        adapters: bytes of the adapters beside the weights, as if all were loaded.
        caches: bytes of the keys and values of the whole context.
        buffers: bytes of everything else that one run takes.
        verdict: ``yes``, ``entitled``, ``tight`` or ``no``; see `AppMemory.verdict`.
        decode: tokens a second at most of the first token, from the memory's bandwidth; None where
            that is not known.
        decode_full: the same of the last token of the context.
        prefill: tokens of a prompt a second at most; None where nothing bounds it.
        work: what a token costs.
        kl: mean KL divergence of the recipe's weights as measured on another model, nats a token;
            None where it was not measured.
        quantized: whether a matrix is stored as codes.
        experts: stored bytes of all experts' matrices; 0 for a dense model.
    """

    recipe: str
    bits: float
    formats: dict[str, int]
    footprint: Footprint
    stored: int
    weights: int
    adapters: int
    caches: int
    buffers: int
    verdict: str
    decode: float | None
    decode_full: float | None
    prefill: float | None
    work: Work
    kl: float | None
    quantized: bool
    experts: int = 0

    @property
    def total(self) -> int:
        """Bytes of weights, adapters, caches and buffers together."""
        return self.weights + self.adapters + self.caches + self.buffers

    def to_json(self) -> dict[str, object]:
        """The row for ``--json``; sizes are in bytes, speeds in tokens a second."""
        return {
            "recipe": self.recipe,
            "bits_per_weight": self.bits,
            "formats": self.formats,
            "stored_bytes": self.stored,
            "weights_bytes": self.weights,
            "adapters_bytes": self.adapters,
            "caches_bytes": self.caches,
            "buffers_bytes": self.buffers,
            "memory_bytes": self.total,
            "fits": self.verdict,
            "decode_at_most": self.decode,
            "decode_at_most_full_context": self.decode_full,
            "prefill_at_most": self.prefill,
            "bytes_read_a_token": self.work.weights,
            "experts_bytes": self.experts,
            "kl_mean_elsewhere": self.kl,
        }


@dataclass(frozen=True)
class TargetForecast:
    """All recipes of one target.

    Attributes:
        target: its name.
        rows: the recipes that it holds, those of the most bits first.
        refused: why it cannot hold others, by their names.
        best: the best recipe that fits; None where none does.
        needs: what must be so for the best one, or what to do where there is none; may be empty.
        mixtures: where no recipe of a mixture fits, released mixtures that do.
    """

    target: str
    rows: tuple[Row, ...]
    refused: dict[str, str]
    best: str | None
    needs: str = ""
    mixtures: tuple[str, ...] = ()


def recipes_on(
    target: Target,
    names: Sequence[str],
    model: SizedModel,
    facts: ModelFacts,
    options: TargetOptions,
    phone: Phone,
    app: AppMemory,
    adapted: Collection[str] = (),
) -> TargetForecast:
    """Returns what a target's artifacts take on a phone, recipe by recipe.

    Args:
        target: the target.
        names: the recipes' names.
        model: the model's sizes.
        facts: what the target is told of it.
        options: the options of all targets.
        phone: the phone.
        app: the memory that an app may take there.
        adapted: the weights that adapters beside them change.
    """
    own = replace(options.only(target.options), max_memory=None)
    check = PlanCheck(model.shapes(), [target], facts, own)
    rows, refused = [], dict[str, str]()
    for name in names:
        try:
            plan = _plan(name, model, check)
            plan.check(check.shapes)
            target.check(plan, check.shapes, facts, own)
            activations = {weight: given.activation for weight, given in plan.weights.items()}
            refuse_rounded(adapted, name, activations)
        except (QuantizationError, ExportError, UsageError) as error:
            refused[name] = str(error)
            continue
        footprint = target.footprint(plan, check.shapes, facts, own)
        rows.append(_row(name, target, plan, model, facts, footprint, phone, app))
    rows.sort(key=lambda row: -row.bits)
    best, needs = _choose(rows, app, facts.context)
    others: tuple[str, ...] = ()
    if best is None and rows and model.spec.mixture:
        least = min(rows, key=lambda row: row.total)
        needs = f"{needs}; {_why(least)}"
        others = fitting_mixtures(target, own, app, facts.context)
    return TargetForecast(target.name, tuple(rows), refused, best, needs, others)


def _why(least: Row) -> str:
    """Why no recipe of a mixture fits, from the smallest one."""
    return (
        f"the smallest, {least.recipe}, takes {size_text(least.total)}, {size_text(least.experts)} "
        f"of it experts, which must all be in memory although a token reads "
        f"{size_text(least.work.weights)}"
    )


def _plan(name: str, model: SizedModel, check: PlanCheck) -> QuantPlan:
    if name == AS_IS:
        assert model.as_is is not None
        plan = model.as_is
    else:
        plan = plan_of(find_recipe(name), model.roles(), check)
    return replace(plan, weights={**plan.weights, **model.imported})


def _row(
    name: str,
    target: Target,
    plan: QuantPlan,
    model: SizedModel,
    facts: ModelFacts,
    footprint: Footprint,
    phone: Phone,
    app: AppMemory,
) -> Row:
    shapes, context = model.shapes(), facts.context
    work = work_of(plan, shapes, model.spec, footprint)
    bandwidth = None if phone.bandwidth is None else phone.bandwidth.number * 1e9
    # Artifacts of other targets run on the CPU, for which no figure with a source was found.
    npu = phone.npu.number * 1e12 if phone.npu is not None and target.name == "coreml" else None
    return Row(
        recipe=name,
        bits=plan.bits_per_weight(shapes, model.spec.num_parameters),
        formats=dict(Counter(given.format.name for given in plan.weights.values())),
        footprint=footprint,
        stored=footprint.stored,
        weights=footprint.weights,
        adapters=footprint.adapters,
        caches=footprint.caches_at(context),
        buffers=footprint.buffers_at(context),
        verdict=app.verdict(footprint.total(context)),
        decode=None if bandwidth is None else work.decode_bound(bandwidth, 0),
        decode_full=None if bandwidth is None else work.decode_bound(bandwidth, context - 1),
        prefill=work.prefill_bound(bandwidth, npu),
        work=work,
        kl=measured_kl(name, target.name),
        quantized=any(is_quantized(given.format) for given in plan.weights.values()),
        experts=expert_bytes(plan, shapes),
    )


def _choose(rows: Sequence[Row], app: AppMemory, context: int) -> tuple[str | None, str]:
    """Returns the best recipe by `RULE`, and what it needs, or what to do where none fits."""
    for verdict, needs in (("yes", ""), ("entitled", "the app needs the entitlement")):
        fitting = [row for row in rows if row.quantized and row.verdict == verdict]
        kept = [row for row in fitting if row.recipe == AS_IS]
        measured = [row for row in fitting if row.kl is not None and row.kl < USEFUL_KL]
        if kept:
            return AS_IS, needs
        if measured:
            return min(measured, key=lambda row: (row.kl or 0.0, row.stored)).recipe, needs
        if fitting:  # those that were measured have lost the model
            return max(fitting, key=lambda row: (row.kl is None, row.bits)).recipe, needs
    if not rows:
        return None, "it can hold none of the recipes"
    longest, least = max(
        ((row.footprint.largest_context(app.largest), row.recipe) for row in rows),
        key=lambda pair: pair[0],
    )
    if longest < 2:
        return None, "none fits, at any context: choose a smaller model or a phone of more memory"
    if longest >= context:
        return None, f"no quantized recipe that was asked for fits, and {least} does"
    return None, f"none fits at {context} tokens; {least} does with --context {longest} or less"
